"""What transformers' users get of a folder saved here: run by test_export.py in a process of its
own, for any version.

    # CASES and ANSWERS are files of torch.save
    python tests/ask_transformers.py FOLDER CASES ANSWERS [COPY]

It opens the folder with from_pretrained and AutoProcessor, answers every case greedily, and saves
what it has opened as another folder, COPY, with save_pretrained.
"""

import sys
from unittest import mock

import oracle
import torch
from torch import Tensor


def register_vision_operators():
    """PyPI's torchvision is built for CUDA, and beside a PyTorch for CPUs its operators are
    missing; declare the two without which it cannot be imported. Nothing here calls them.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library


def open_folder(folder: str, version: tuple[int, ...]):
    """-> model, processor, and the names of missing, unexpected and misshapen tensors."""
    from transformers import AutoProcessor, Qwen2_5OmniForConditionalGeneration, modeling_utils

    parent = modeling_utils.PreTrainedModel.from_pretrained.__func__
    # The class' own from_pretrained fails on output_loading_info in both versions, and adds only
    # the voices.
    _, report = parent(
        Qwen2_5OmniForConditionalGeneration, folder, dtype="auto", output_loading_info=True
    )
    model = Qwen2_5OmniForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    if version >= (5,):
        oracle.repair_talker_mask(model)
    problems = [
        str(name)
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
        for name in report[key]
    ]
    return model, AutoProcessor.from_pretrained(folder), problems


def prepare(processor, case: dict, version: tuple[int, ...]) -> dict:
    """The model's inputs as this version's users make them."""
    text = processor.apply_chat_template(
        case["messages"], add_generation_prompt=True, tokenize=False
    )
    media = {name: case[name] for name in ("images", "videos", "audio") if case[name]}
    videos = {"size": case["frame_size"]}
    if case["use_audio_in_video"] and version >= (5,):
        media |= {"load_audio_from_video": True, "audio_from_video_indices": [0]}
    elif case["use_audio_in_video"]:
        videos["use_audio_in_video"] = True
    return processor(text=text, **media, videos_kwargs=videos, return_tensors="pt", padding=True)


def answer(model, processor, case: dict, version: tuple[int, ...]) -> dict:
    given = dict(prepare(processor, case, version))
    record = {"prompt": given["input_ids"][0].tolist()}
    record |= {
        name: given[name] for name in ("pixel_values", "pixel_values_videos") if name in given
    }
    if "input_features" in given:
        record["mels"] = [
            mel[:, mask.bool()]
            for mel, mask in zip(given["input_features"], given["feature_attention_mask"])
        ]
    if version >= (
        5,
    ):  # there a name without thinker_ goes to the Talker as well, which refuses it
        given = {
            f"thinker_{name}" if name.startswith("pixel_values") else name: x
            for name, x in given.items()
        }
    calls = []  # of Token2Wav: arguments and named arguments
    hook = model.token2wav.register_forward_pre_hook(
        lambda _, arguments, named: calls.append((arguments, named)), with_kwargs=True
    )
    torch.manual_seed(0)
    ids, wave = model.generate(
        **given,
        use_audio_in_video=case["use_audio_in_video"],
        speaker=case["speaker"],
        thinker_do_sample=False,
        talker_do_sample=False,
        **case["options"],
    )
    hook.remove()
    [(arguments, named)] = calls
    codes = arguments[0] if arguments else named["code"]
    return record | {
        "tokens": ids[0, len(record["prompt"]) :].tolist(),
        "codes": codes[0].tolist(),
        "wave": wave,
        "wave_fp64": wave_in_fp64(model.token2wav, arguments, named),
    }


@torch.no_grad()
def wave_in_fp64(token2wav, arguments: tuple, named: dict) -> Tensor:
    """A call of Token2Wav once more in fp64, from the same initial noise -> waveform [samples]."""
    draw = torch.randn

    def noise_of_fp32(*shape, dtype=None, **options):
        return draw(*shape, **options).to(dtype)

    token2wav.double()
    torch.manual_seed(0)
    with mock.patch.object(torch, "randn", noise_of_fp32):
        wave = token2wav(
            *map(to_fp64, arguments), **{name: to_fp64(value) for name, value in named.items()}
        )
    token2wav.float()
    return wave.reshape(-1)


def to_fp64(value):
    """Floating-point tensors in fp64; anything else as it is."""
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if is_float else value


def main(folder: str, cases: str, answers: str, copy: str | None = None) -> None:
    torch.set_num_threads(1)
    library = register_vision_operators()
    import transformers

    transformers.utils.logging.set_verbosity_error()
    version = tuple(map(int, transformers.__version__.split(".")))
    model, processor, problems = open_folder(folder, version)
    given = torch.load(cases, weights_only=False)

    def encode(text):
        return processor.tokenizer(text)["input_ids"]

    torch.save(
        {
            "version": transformers.__version__,
            "problems": problems,
            "texts": {text: encode(text) for text in given["texts"]},
            "special": {
                token: processor.tokenizer.convert_tokens_to_ids(token)
                for token in given["special"]
            },
            "said": processor.tokenizer.decode(given["ids"], skip_special_tokens=True),
            "answers": [answer(model, processor, case, version) for case in given["cases"]],
        },
        answers,
    )
    if copy is not None:
        model.save_pretrained(copy)
        processor.save_pretrained(copy)
        torch.save(model.speaker_map, f"{copy}/spk_dict.pt")  # which save_pretrained forgets
    del library


if __name__ == "__main__":
    main(*sys.argv[1:])
