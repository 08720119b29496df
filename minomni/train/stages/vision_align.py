"""Stage vision_align: the vision encoder learns to give the Thinker what it sees."""

from random import Random

import torch
from torch import nn

from minomni.config import IGNORE_INDEX
from minomni.data.oracle_features import cell_words
from minomni.inputs.patches import image_patches, video_patches
from minomni.train.loop import to_device
from minomni.train.stages.alignment import (
    PLAIN,
    AlignStage,
    classes_of,
    embedding_mse,
    embedding_similarity,
)


class VisionAlignStage(AlignStage):
    name, learns = "vision_align", ("thinker.visual.",)
    about = "the vision encoder learns to point at the words for what it sees (in place of Qwen2.5-VL's weights)"
    data = "generated pictures and clips, handwritten digits"

    def batch(self, number):
        return self.draw(Random(f"{self.seed}-eyes-{number}"), self.recipe.batch)

    def draw(self, random, count):
        """Patches [N, patch_dim], grids and classes [N / 4, 4] of some pictures and clips."""
        patches, grids, classes = [], [], []
        vision, media = self.omni.config.thinker.vision, self.omni.config.media
        for i in range(count):
            example = self.teacher.example(
                ("handwriting", "scene", "scene", "video")[i % 4], random
            )
            rows, grid = (
                image_patches(example.image, vision, media)
                if example.clip is None
                else video_patches(torch.from_numpy(example.clip[0]), vision, media)
            )
            patches.append(rows)
            grids.append(grid)
            words = cell_words(example, grid, vision, self.encode)
            classes.append(torch.where(words == IGNORE_INDEX, words, words + 1))
        return torch.cat(patches), grids, torch.cat(classes)

    def losses(self, batch):
        patches, grids, classes = batch
        features = self.omni.thinker.visual(patches, grids)
        scores = embedding_similarity(features, self.omni.thinker, self.tokens.image)
        repeated = scores.repeat(classes.shape[1], 1)  # each word of a cell is a target of its own
        said = (classes != IGNORE_INDEX)[..., None]  # [N, 4, 1]
        meant = (classes_of(self.omni.thinker, self.tokens.image)[classes.clamp_min(0)] * said).sum(
            1
        )  # [N, D]
        clear, full = said.any(1)[:, 0], classes[:, 0] > 0
        return {
            "cells": nn.functional.nll_loss(
                repeated, classes.T.flatten(), ignore_index=IGNORE_INDEX
            ),
            "plain": PLAIN
            * (
                embedding_mse(features[full], meant[full])
                + embedding_mse(features[clear], meant[clear])
            ),
        }

    def sample(self):
        patches, grids, classes = to_device(self.draw(Random(7), 32), self.device)
        scores = embedding_similarity(
            self.omni.thinker.visual(patches, grids), self.omni.thinker, self.tokens.image
        )
        best = scores.topk(classes.shape[1]).indices
        full = classes[:, 0] > 0
        right = ((classes[..., None] == best[:, None]).any(-1) | (classes == IGNORE_INDEX)).all(1)
        return f"{right[full].float().mean().item():.0%} of full cells named right"
