"""Stage vision_align: the vision encoder learns to output word embeddings."""

from random import Random

import torch
from torch import Tensor
from torch.nn import functional as F

from minomni.config import IGNORE_INDEX
from minomni.data.oracle_features import cell_words
from minomni.inputs.patches import Grid, image_patches, video_patches
from minomni.train.loop import to_device
from minomni.train.stages.alignment import (
    MSE_WEIGHT,
    AlignStage,
    classes_of,
    embedding_mse,
    embedding_similarity,
)

KINDS = ("handwriting", "scene", "scene", "video")  # of the examples, in turn

Batch = tuple[Tensor, list[Grid], Tensor]  # patches, grids, classes of the cells


class VisionAlignStage(AlignStage):
    """Classification of each merge cell into the words of its object, and regression onto them."""

    name = "vision_align"
    trainable = ("thinker.visual.",)
    description = (
        "the vision encoder learns to predict the words of each cell (instead of Qwen2.5-VL's "
        "weights)"
    )
    data = "generated images and videos, handwritten digits"

    def batch(self, number: int) -> Batch:
        # The seed keeps a former name of the stage, so that runs repeat.
        return self.draw(Random(f"{self.seed}-eyes-{number}"), self.recipe.batch)

    def draw(self, random: Random, count: int) -> Batch:
        """Patches [N, patch_dim], grids and classes [N / 4, 4] of some images and videos."""
        patches = []
        grids = []
        classes = []
        vision = self.omni.config.thinker.vision
        media = self.omni.config.media
        for i in range(count):
            example = self.builder.example(KINDS[i % len(KINDS)], random)
            if example.image is not None:
                rows, grid = image_patches(example.image, vision, media)
            else:
                assert example.clip is not None  # every kind has an image or a clip
                frames = torch.from_numpy(example.clip[0])
                rows, grid = video_patches(frames, vision, media)
            patches.append(rows)
            grids.append(grid)
            words = cell_words(example, grid, vision, self.encode)
            classes.append(torch.where(words == IGNORE_INDEX, words, words + 1))  # 0: background
        return torch.cat(patches), grids, torch.cat(classes)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        patches, grids, classes = batch
        thinker = self.omni.thinker
        features = thinker.visual(patches, grids)
        log_probs = embedding_similarity(features, thinker, self.tokens.image)

        # Each of the up to four words of a cell is a target.
        repeated = log_probs.repeat(classes.shape[1], 1)
        cell_loss = F.nll_loss(repeated, classes.T.flatten(), ignore_index=IGNORE_INDEX)

        # Regression targets: the sum of the embeddings of a cell's words.
        labeled = (classes != IGNORE_INDEX)[..., None]  # [N, 4, 1]
        embeddings = classes_of(thinker, self.tokens.image)[classes.clamp_min(0)]
        target = (embeddings * labeled).sum(1)  # [N, D]
        any_label = labeled.any(1)[:, 0]
        is_object = classes[:, 0] > 0
        object_mse = embedding_mse(features[is_object], target[is_object])
        labeled_mse = embedding_mse(features[any_label], target[any_label])
        return {"cells": cell_loss, "mse": MSE_WEIGHT * (object_mse + labeled_mse)}

    def preview_text(self) -> str:
        patches, grids, classes = to_device(self.draw(Random(7), 32), self.device)
        features = self.omni.thinker.visual(patches, grids)
        log_probs = embedding_similarity(features, self.omni.thinker, self.tokens.image)

        # A cell counts as correct if its words are the classes with the highest probabilities.
        top = log_probs.topk(classes.shape[1]).indices
        found = (classes[..., None] == top[:, None]).any(-1)  # [N, 4]
        correct = (found | (classes == IGNORE_INDEX)).all(1)
        is_object = classes[:, 0] > 0
        accuracy = correct[is_object].float().mean().item()
        return f"{accuracy:.0%} of object cells correct"
