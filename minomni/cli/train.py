"""The commands train, train-encoder and pack."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from minomni import load, paths
from minomni.cli.options import COUNT, Conflicts, add_quantize, add_run, number_between, refuse
from minomni.errors import UserError, escape, quote

if TYPE_CHECKING:
    from minomni.cli.options import Parser

# Options that only `train --data` uses -> the message of `train` without --data.
NEEDS_DATA: Conflicts = {
    ("epochs", "out"): "--epochs and --out go with --data",
    ("lora", "parts", "skip-corrupt"): "--lora, --parts and --skip-corrupt go with --data",
    ("held-out",): "--held-out goes with --data",
    ("quantize",): "--quantize goes with --data and --lora",
}


def add_train(commands: "argparse._SubParsersAction[Parser]") -> None:
    train = commands.add_parser(
        "train",
        help="train a size from scratch, stage by stage",
        description="Trains every stage that is not finished, two at a time, and writes "
        "runs/SIZE/model. tiny takes 8 GB of memory; on two cores, under an hour or, with "
        "--budget long, some hours.",
    )
    train.add_argument("size", nargs="?", default="tiny", help="tiny (default) or small")
    add_recipe(train)
    add_run(train, "runs/SIZE", "; with --stage, of that stage only")
    train.add_argument(
        "--data",
        type=Path,
        help="fine-tune the trained model on your data: a JSONL file of messages and replies, or a "
        "folder of recordings or of shards that `pack` wrote; --stage chat or talker",
    )
    add_own_data(train)
    add_lora_options(train)
    train.add_argument(
        "--no-progress", action="store_true", help="print lines only, without a progress bar"
    )


def add_recipe(train: argparse.ArgumentParser) -> None:
    """Which stages are trained, and how."""
    train.add_argument("--stage", help="run this one stage only; --stages lists them")
    train.add_argument(
        "--stages",
        action="store_true",
        help="list the stages: trained parts, seconds, losses, data",
    )
    train.add_argument(
        "--budget",
        choices=("quick", "long"),
        default="quick",
        help="steps of tiny's stages: quick (default), or long, which made the shipped weights",
    )
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="STAGE.FIELD=VALUE",
        help="change the recipe of a stage, as in --set talker.steps=200; may be repeated. "
        "Fields: steps, batch, lr, accumulate, warmup, weight_decay, clip",
    )


def add_own_data(train: argparse.ArgumentParser) -> None:
    """What --data does."""
    train.add_argument(
        "--skip-corrupt",
        action="store_true",
        help="leave out damaged samples of packed data, naming each",
    )
    train.add_argument(
        "--held-out",
        metavar="SPEAKER",
        help="train without the rows of this speaker, and print how well the model answers them "
        'before and after; spoken digits name the speaker in the file, JSONL rows in "speaker"',
    )
    train.add_argument(
        "--epochs", type=COUNT, help="passes over --data (default 3, more if it is small)"
    )
    train.add_argument(
        "--out", type=Path, help="folder of the fine-tuned model (default runs/SIZE/tuned)"
    )


def add_lora_options(train: argparse.ArgumentParser) -> None:
    """Options of training adapters instead of the weights."""
    train.add_argument(
        "--lora",
        metavar="r=N",
        help="train adapters of this rank and leave the weights as they are, as in --lora r=16; "
        "also alpha=32 and layers=q_proj+v_proj; SIZE may then be the folder of any model",
    )
    train.add_argument(
        "--parts",
        metavar="PARTS",
        help="what --lora tunes: thinker, talker, or thinker,talker (default: what the data can)",
    )
    add_quantize(train)


def add_train_encoder(commands: "argparse._SubParsersAction[Parser]") -> None:
    command = commands.add_parser(
        "train-encoder",
        help="train an encoder for the speech codes of a folder that has none",
        description="The model speaks, and an encoder learns to predict the codes of this speech. "
        "Writes the model with the encoder as its codec, which `train --data` needs to tune the "
        "Talker on recordings.",
    )
    command.add_argument("folder", help="folder of a model, or a size trained here")
    command.add_argument(
        "--data",
        type=Path,
        help="rows whose answers the Talker speaks, as for `train` (default: sentences of tiny)",
    )
    command.add_argument(
        "--out", type=Path, help="folder of the new model (default runs/FOLDER/with-encoder)"
    )
    command.add_argument(
        "--size",
        choices=("tiny", "small"),
        default="small",
        help="the encoder is as large as the codec of this size (default small)",
    )
    command.add_argument(
        "--pairs", type=COUNT, default=2000, help="pairs of codes and sound (default 2000)"
    )
    command.add_argument(
        "--steps", type=COUNT, default=3000, help="training steps of 16 pairs (default 3000)"
    )
    command.add_argument(
        "--random-codes",
        type=number_between(0, 1),
        default=0.1,
        metavar="SHARE",
        help="share of the pairs, from 0 to 1, whose codes are drawn at random and not spoken by "
        "the Talker (default 0.1)",
    )
    add_run(command, "runs/FOLDER")


def add_pack(commands: "argparse._SubParsersAction[Parser]") -> None:
    pack = commands.add_parser(
        "pack",
        help="write training data with its media as tar shards",
        description="Shards are in WebDataset's format, with an index; train --data reads them.",
    )
    pack.add_argument("data", type=Path, help="a JSONL file, or a folder of recordings")
    pack.add_argument("out", type=Path, help="the folder to write")


def run_train(arguments: argparse.Namespace) -> None:
    """List the stages, fine-tune on own data, run one stage, or train a size from scratch."""
    from minomni.devices import device_of
    from minomni.train import processes, stage_table

    if arguments.stages:
        print(stage_table.stage_table(arguments.size))
        return
    device = device_of(arguments.device).type
    home = arguments.home or paths.runs() / Path(arguments.size).resolve().name
    with processes.process_group(device):
        if arguments.data:
            run_finetune(arguments, home, device)
        else:
            run_stages(arguments, home, device)


def run_stages(arguments: argparse.Namespace, home: Path, device: str) -> None:
    """Run one stage, or all stages and the export of the model."""
    from minomni.train import distributed, pipeline, recipes, run_settings, stage_table

    refuse(arguments, NEEDS_DATA)

    # Everything is checked before anything is written.
    first_stage = next(iter(stage_table.STAGES))
    recipes.recipe_of(arguments.stage or first_stage, arguments.size)
    settings = recipes.budget_settings(arguments.budget, arguments.size)
    settings = recipes.merge_settings(settings, recipes.parse_settings(arguments.set))
    noted = {} if arguments.fresh else run_settings.read_settings(home)
    pipeline.check_batches(arguments.size, noted | settings, arguments.stage)
    with distributed.first_goes_first():
        if distributed.is_first():
            pipeline.prepare_run(home, arguments.resume, arguments.fresh, arguments.stage)
            run_settings.record_settings(home, settings)
    if arguments.stage:
        pipeline.run_stage(
            arguments.stage,
            arguments.size,
            home,
            arguments.seed,
            arguments.resume,
            device,
            progress=not arguments.no_progress,
        )
    else:
        train_all(arguments.size, home, arguments.seed, device)


def train_all(size: str, home: Path, seed: int, device: str) -> None:
    """Run all stages that are not finished and export the model."""
    from minomni.train import distributed, pipeline, provenance, stage_pool, stage_table

    began = time.perf_counter()
    try:
        if distributed.world() == 1:
            stage_pool.run_all(size, home, seed, device)
        else:
            for name in stage_table.STAGES:
                pipeline.run_stage(name, size, home, seed, True, device, progress=False)
    finally:
        seconds = time.perf_counter() - began
        if distributed.is_first():
            seconds = provenance.add_elapsed(home, seconds)
    if not distributed.is_first():
        return
    pipeline.export_model(size, home, seed)
    print(f"trained in {seconds:.0f} s: {escape(str(home / 'model'))}")


def run_finetune(arguments: argparse.Namespace, home: Path, device: str) -> None:
    """Fine-tune a trained size on the data of --data."""
    from minomni.checkpoint.lora import parse_lora
    from minomni.train import distributed
    from minomni.train.finetune import FinetuneOptions, finetune

    if arguments.set or arguments.budget != "quick":
        raise UserError("--set and --budget change the stages of a size and do not go with --data")
    lora = None if arguments.lora is None else parse_lora(arguments.lora)
    options = FinetuneOptions(
        stage=arguments.stage,
        epochs=arguments.epochs,
        seed=arguments.seed,
        resume=arguments.resume,
        fresh=arguments.fresh,
        lora=lora,
        lora_parts=lora_parts(arguments),
        quantize=arguments.quantize,
        skip_corrupt=arguments.skip_corrupt,
        held_out_speaker=arguments.held_out,
    )
    out = arguments.out or home / ("adapter" if lora else "tuned")
    folder = finetune(arguments.size, arguments.data, out, options, device, home)
    if arguments.held_out and distributed.is_first():
        print(held_out_scores(arguments, folder, lora is not None, device))
    shown = escape(str(folder))
    if lora and distributed.is_first():
        print(f"tuned: {shown}; python -m minomni merge {escape(arguments.size)} {shown} OUT")
    elif distributed.is_first():
        print(f"tuned: {shown}; python -m minomni chat --model {shown}")


def held_out_scores(
    arguments: argparse.Namespace, tuned_folder: Path, is_adapter: bool, device: str
) -> str:
    """The answers to the held-out speaker before and after fine-tuning, as a table."""
    from minomni.checkpoint.lora import load_lora
    from minomni.eval import held_out_speaker

    omni = load(arguments.size, device, quantize=arguments.quantize)
    rows = held_out_speaker.held_out_rows(arguments.data, omni, arguments.held_out)
    before = held_out_speaker.answer_metrics(omni, rows)
    if is_adapter:
        load_lora(omni, tuned_folder)
    else:
        omni = load(tuned_folder, device)
    after = held_out_speaker.answer_metrics(omni, rows)
    return held_out_speaker.comparison(before, after)


def lora_parts(arguments: argparse.Namespace) -> tuple[str, ...]:
    """What --parts names. Raises UserError for other names, and without --lora."""
    from minomni.checkpoint.lora import TUNABLE_PARTS

    if arguments.parts is None:
        return ()
    if arguments.lora is None:
        raise UserError("--parts goes with --lora, as in --lora r=16 --parts talker")
    names = tuple(arguments.parts.split(","))
    for name in names:
        if name not in TUNABLE_PARTS:
            raise UserError(f"--parts: {quote(name)} is not one of {', '.join(TUNABLE_PARTS)}")
    return names


def run_train_encoder(arguments: argparse.Namespace) -> None:
    """Train an encoder for the codes of a folder."""
    from minomni.devices import device_of
    from minomni.train import distributed, processes
    from minomni.train.train_encoder import EncoderOptions, train_encoder

    device = device_of(arguments.device).type
    home = arguments.home or paths.runs() / Path(arguments.folder).resolve().name
    options = EncoderOptions(
        arguments.size, arguments.pairs, arguments.steps, arguments.random_codes
    )
    with processes.process_group(device):
        out = train_encoder(
            arguments.folder,
            arguments.out or home / "with-encoder",
            options,
            data=arguments.data,
            seed=arguments.seed,
            resume=arguments.resume,
            fresh=arguments.fresh,
            device=device,
            home=home,
        )
        if distributed.is_first():
            shown = escape(str(out))
            command = f"python -m minomni train {shown} --data FILE --lora r=16 --parts talker"
            print(f"with an encoder: {shown}; {command}")


def run_pack(arguments: argparse.Namespace) -> None:
    """Write training data as shards."""
    from minomni.data.shards import pack

    count = pack(arguments.data, arguments.out)
    print(f"packed {count} rows: {escape(str(arguments.out))}")
