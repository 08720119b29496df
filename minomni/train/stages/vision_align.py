"""Stage vision_align: the vision encoder learns to output word embeddings."""

from random import Random

import torch
from torch import Tensor

from minomni.config import IGNORE_INDEX
from minomni.data.oracle_features import cell_words
from minomni.inputs.patches import Grid, image_patches, video_patches
from minomni.train import losses
from minomni.train.loop import to_device
from minomni.train.stages.alignment import (
    MSE_WEIGHT,
    AlignStage,
    classes_of,
    embedding_mse,
    embedding_similarity,
)

KINDS = ("handwriting", "scene", "scene", "video")  # of the examples, in turn

Row = tuple[Tensor, Grid, Tensor]  # patches [n, patch_dim], their grid, classes [n / 4, 4]


class VisionAlignStage(AlignStage):
    """Classification of each merge cell into the words of its object, and regression onto them."""

    name = "vision_align"
    trainable = ("thinker.visual.",)
    description = (
        "the vision encoder learns to predict the words of each cell (instead of Qwen2.5-VL's "
        "weights)"
    )
    data = "generated images and videos, handwritten digits"

    def whole_batch(self, number: int) -> list[Row]:
        # The seed keeps a former name of the stage, so that runs repeat.
        return self.draw(Random(f"{self.seed}-eyes-{number}"), self.recipe.batch)

    def draw(self, random: Random, count: int) -> list[Row]:
        """Some images and videos, with the classes of their cells."""
        rows = []
        vision = self.omni.config.thinker.vision
        media = self.omni.config.media
        for i in range(count):
            example = self.builder.example(KINDS[i % len(KINDS)], random)
            if example.image is not None:
                patches, grid = image_patches(example.image, vision, media)
            else:
                assert example.clip is not None  # every kind has an image or a clip
                frames = torch.from_numpy(example.clip[0])
                patches, grid = video_patches(frames, vision, media)
            words = cell_words(example, grid, vision, self.encode)
            classes = torch.where(words == IGNORE_INDEX, words, words + 1)  # 0: background
            rows.append((patches, grid, classes))
        return rows

    def features(self, batch: list[Row]) -> tuple[Tensor, Tensor]:
        """The encoder's outputs [N, D] for all cells of a batch, and their classes [N, 4]."""
        patches, grids, classes = zip(*batch, strict=True)
        features = self.omni.thinker.visual(torch.cat(patches), list(grids))
        return features, torch.cat(classes)

    def losses(self, batch: list[Row]) -> dict[str, Tensor]:
        features, classes = self.features(batch)
        thinker = self.omni.thinker
        log_probs = embedding_similarity(features, thinker, self.tokens.image)

        # Each of the up to four words of a cell is a target.
        repeated = log_probs.repeat(classes.shape[1], 1)
        cell_loss = losses.next_token(repeated[None], classes.T.flatten()[None])

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
        features, classes = self.features(to_device(self.draw(Random(7), 32), self.device))
        log_probs = embedding_similarity(features, self.omni.thinker, self.tokens.image)

        # A cell counts as correct if its words are the classes with the highest probabilities.
        top = log_probs.topk(classes.shape[1]).indices
        found = (classes[..., None] == top[:, None]).any(-1)  # [N, 4]
        correct = (found | (classes == IGNORE_INDEX)).all(1)
        is_object = classes[:, 0] > 0
        accuracy = correct[is_object].float().mean().item()
        return f"{accuracy:.0%} of object cells correct"
