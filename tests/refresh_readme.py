"""Write the generated tables of README.md, README_zh.md, notebooks/results.md and usage.md.

    python tests/refresh_readme.py
        write all tables again
    python tests/refresh_readme.py --report runs/report.json --size tiny
        take the rows that `python -m minomni report` has left first (--size tiny_quick: of a model
        of the quick budget, where tiny is the shipped one)
    python tests/refresh_readme.py --stream stream.json
        take the rows of `python -m minomni bench stream --json` first (--avx2: of a processor
        without AVX-512)
    python tests/refresh_readme.py --first first.json --size tiny --device "two cores"
        take the rows of `python -m minomni bench first --json` first
    python tests/refresh_readme.py --serve serve.json
        take the rows of `python -m minomni bench serve --json` first
    python tests/refresh_readme.py --page page.json
        take the times of `python tests/measure_page.py --json page.json` first
    python tests/refresh_readme.py --answer answer.json
        take the rows of `python -m minomni bench answer --json` first
    python tests/refresh_readme.py --parts parts.json
        take the rows of `python -m minomni bench parts --json` first, beside those of another dtype
    python tests/refresh_readme.py --quantized report.json --method int4
        take the rows of `python -m minomni report --quantize int4 --items 50 --json` first
        (--method none: without --quantize)
    python tests/refresh_readme.py --processes processes.json
        take the rows of `python -m minomni bench processes --json` first
    python tests/refresh_readme.py --encoder OUT/result.json
        take the rows of `python tests/measure_encoder.py OUT` first

Needs the package: pip install -e .

A generated table stands between <!-- NAME --> and <!-- end of NAME -->. Measured numbers come from
data_samples/tiny_results.json, sizes and stages from the package, chapters from the notebooks,
unusual files from the marker `reads` of the tests that prove them.
"""

import argparse
import ast
import json
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import chapters
import torch

from minomni import config
from minomni.eval.parts_benchmark import BACKENDS, OURS, THEIRS, UNITS
from minomni.eval.parts_benchmark import ROWS as PART_ROWS
from minomni.eval.stats import Metric
from minomni.omni import Omni
from minomni.train import recipes
from minomni.train.measured_runs import measured

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "data_samples" / "tiny_results.json"
DOCUMENTS = {
    "README.md": "en",
    "README_zh.md": "zh",
    "notebooks/results.md": "en",
    "notebooks/usage.md": "en",
}
BEGIN = re.compile(r"^<!-- (\w+) -->$", re.MULTILINE)

# The rows of the report that stand in the READMEs: metric -> (English, Chinese)
HEADLINE_METRICS = {
    "typed_accuracy": ("typed requests, correct", "文字请求，答对"),
    "spoken_accuracy": ("spoken requests and questions, correct", "语音请求与提问，答对"),
    "scene_accuracy": ("questions about images, correct", "图片问题，答对"),
    "video_accuracy": ("questions about clips, correct", "短片问题，答对"),
    "asr_wer": ("transcripts of speech, word error rate", "听写，词错误率"),
    "open_wer_model": (
        "its own speech, word error rate of Whisper",
        "模型的语音，Whisper 的词错误率",
    ),
    "open_wer_streamed": ("its own speech when streamed", "流式语音，词错误率"),
    "open_wer_recordings": ("recordings of the same sentences", "同样句子的录音，词错误率"),
}
# Tables of the report: caption -> how the names of its rows begin
REPORT_TABLES = {
    "Answers": ("typed_", "spoken_", "scene_", "handwriting_", "video_", "sync_"),
    "Transcripts of what it hears": ("asr_",),
    "Its speech, by a recognizer of a closed grammar and a classifier of voices": (
        "closed_",
        "stop_",
        "voice_",
    ),
    "Speech after each step, by Whisper": ("open_wer_",),
    "The same after a prompt": ("prompted_wer_",),
    "Naturalness and likeness of voices": ("dnsmos_", "speaker_similarity_"),
}
# Rows of the report that are scores on a scale of their own, not fractions: how their names begin
SCORES = ("dnsmos_", "speaker_similarity_")
STREAM_ROWS = {
    "first_audio_ms": "from the question to the first audio",
    "first_audio_ratio": "the same, divided by the time of a reply of 10 s that is not streamed",
    "streamed_cost_ratio": "CPU time of a streamed reply, divided by that of one not streamed",
    "streamed_cost_ratio_same_solver": "the same, with the ODE solver of `respond`, not Euler",
    "realtime_factor": "seconds of work for a second of streamed speech",
    "player_waits_ms": "buffer that a player needs to play without a gap",
    "buffer_by_rule_ms": "buffer that a slow Thinker would need: N / r - N / R "
    "for N = 9 text tokens at r a second and R = 25 codes a second",
    "words_after_first_audio": "text tokens that come after the first audio",
    "prediction_ratio": "predicted time to the first audio, divided by the measured one",
    "session_growth_mb": "memory that 600 s of listening add after the first full context",
}
STREAM_STAGES = {
    "prefill": "prefill",
    "text": "first text token",
    "code": "first speech code",
    "mel": "first mel frames",
    "audio": "first audio",
}
# Rows of the table of bench answer, which is in English alone
ANSWER_ROWS = {
    "load_s": "loading 22.4 GB, s",
    "peak_gib": "largest memory of the process, GiB",
    "text_s": "a text until the first token, files read on the way, s",
    "image_s": "an image of 224 x 224 alone, s",
    "audio_s": "two seconds of audio alone, s",
    "tokens_per_s": "text tokens per second",
    "tokens_per_s_limit": "the same if a step only read weights",
    "codes_per_s": "speech codes per second",
    "codes_per_s_limit": "the same if a step only read weights",
    "token2wav_s": "Token2Wav for a second of speech, s",
    "copy_gb_per_s": "bandwidth of a copy in memory, GB/s",
}
QUANTIZED_METRICS = (
    "typed_accuracy",
    "spoken_accuracy",
    "scene_accuracy",
    "handwriting_accuracy",
    "video_accuracy",
    "sync_accuracy",
    "asr_wer",
    "closed_speech_wer",
    "open_wer_model",
    "open_wer_streamed",
    "voice_accuracy",
    "dnsmos_model",
)
# transformers' time or memory divided by ours, at least
PART_GOALS = {
    "load": 2,
    "load_memory": 1,
    "log_mel": 3,
    "image": 1.5,
    "audio_encoder": 1,
    "vision_encoder": 1,
    "prefill": 1,
    "thinker_step": 1.3,
    "talker_step": 1.5,
    "token2wav": 1.3,
    "first_audio": 10,
    "thinker_training": 1,
    "talker_training": 1,
}
# Kinds of processors, as PyTorch names them -> as the documents do
PROCESSORS = {"AVX512": "AVX-512", "AVX2": "AVX2", "DEFAULT": "no AVX2"}
# Of those rows the ones in the READMEs: row -> (English, Chinese)
README_PARTS = {
    "audio_encoder": ("audio encoder", "音频编码器"),
    "prefill": ("prefill", "预填充"),
    "thinker_step": ("text token", "文字 token"),
    "talker_step": ("speech code", "语音编码"),
    "token2wav": ("Token2Wav", "Token2Wav"),
    "thinker_training": ("forward and backward of the Thinker", "Thinker 前向与反向"),
}
# Rows of the latency table: key -> (English, Chinese)
LATENCY_ROWS = {
    "codes_before_audio": ("codes before the first audio", "第一段音频所需的编码数"),
    "thinker_and_talker_ms": ("one step of Thinker and Talker, ms", "Thinker 与 Talker 一步，毫秒"),
    "mel_and_audio_ms": ("mel and audio of the first chunk, ms", "第一段的梅尔谱与波形，毫秒"),
    "first_audio_ms": ("first audio, ms", "第一段音频，毫秒"),
    "realtime_factor": ("seconds of work for a second of speech", "每秒语音所需的计算时间，秒"),
}
CLIENTS = (1, 4, 16)  # at once
SERVING_ROWS = {  # by numbers of clients
    "text_requests_per_s": "text answers per second",
    "speech_requests_per_s": "spoken answers per second",
    "first_audio_ms": "from a typed question to the first audio, ms",
}
DEVICES_IN_CHINESE = {"two cores": "双核", "one core": "单核", "H200": "H200"}
# What each stage trains, in words: stage -> (English, Chinese)
STAGES = {
    "codec": (
        "speech tokenizer (FSQ): reads letters by CTC and restores the mel from its codes",
        "语音编解码器（FSQ）",
    ),
    "vocoder": (
        "BigVGAN: mel to waveform, by mel and STFT distance, then discriminators",
        "声码器 BigVGAN，后期加判别器",
    ),
    "dit": ("flow-matching DiT: codes to mel in sliding blocks", "流匹配 DiT"),
    "language": (
        "decoder, on text with ideal encoder outputs (instead of Qwen2.5's weights)",
        "解码器",
    ),
    "audio_align": ("audio encoder, by CTC (instead of Whisper's weights)", "音频编码器"),
    "vision_align": (
        "vision encoder, word for each image cell (instead of Qwen2.5-VL's weights)",
        "视觉编码器",
    ),
    "thinker1": ("pre-training 1: encoders, decoder frozen", "预训练一：编码器"),
    "thinker2": ("pre-training 2: whole Thinker, all kinds of input", "预训练二：整个 Thinker"),
    "thinker3": ("pre-training 3: long sequences", "预训练三：长序列"),
    "chat": ("instruction tuning in ChatML, typed and spoken", "ChatML 指令微调"),
    "talker": ("next-code prediction from Thinker states and words", "Talker"),
    "dpo": ("DPO: best of four samples of a long sentence over the worst", "DPO"),
    "speakers": ("speaker tuning: all voices at a low rate", "说话人微调"),
}
SIZE_ROWS = {  # row -> prefixes of the tensors that it counts
    ("parameters", "参数"): ("",),
    ("audio encoder", "音频编码器"): ("thinker.audio_tower.",),
    ("vision encoder", "视觉编码器"): ("thinker.visual.",),
    ("Thinker's decoder and head", "Thinker 的解码器与输出头"): (
        "thinker.model.",
        "thinker.lm_head.",
    ),
    ("Talker", "Talker"): ("talker.",),
    ("DiT with ECAPA", "DiT 与 ECAPA"): ("token2wav.code2wav_dit_model.",),
    ("BigVGAN", "BigVGAN"): ("token2wav.code2wav_bigvgan_model.",),
    ("codec (ours)", "编解码器（自制）"): ("codec.",),
}


# ---------------------------------------------------------------------------------------------
# Markdown


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, *rows]
    text = [f"| {' | '.join(line)} |\n" for line in lines]
    return "".join([text[0], "|---" * len(head) + "|\n", *text[1:]])


def percent(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1%}"


def value_of(name: str, row: dict) -> str:
    """The value of a row of the report."""
    return score(row["value"]) if name.startswith(SCORES) else percent(row["value"])


def score(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}"


def interval_of(name: str, row: dict) -> str:
    """The interval of a row of the report."""
    if name.startswith(SCORES) and "low" in row:
        return f"{score(row['low'])} to {score(row['high'])}"
    return interval(row)


def interval(row: dict, to: str = "to") -> str:
    return f"{row['low']:.1%} {to} {row['high']:.1%}" if "low" in row else ""


def items(row: dict) -> str:
    return f"{row['items']:,}" if "items" in row else ""


def in_language(texts: tuple[str, str], language: str) -> str:
    english, chinese = texts
    return chinese if language == "zh" else english


# ---------------------------------------------------------------------------------------------
# The tables


@cache
def results() -> dict:
    """All measured numbers."""
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def report_rows(model: str) -> dict[str, dict]:
    """The rows of a model's report; none for a model without one."""
    return results()["report"].get(model, {"rows": {}})["rows"]


def headline(language: str) -> str:
    """Eight rows of tiny's report."""
    heads = (
        "tiny | value | 95 % interval | items or words",
        "tiny | 数值 | 95 % 区间 | 题数或词数",
    )
    rows = []
    for name, texts in HEADLINE_METRICS.items():
        row = report_rows("tiny")[name]
        to = in_language(("to", "至"), language)
        label = f"{in_language(texts, language)} (`{name}`)"
        rows.append([label, percent(row["value"]), interval(row, to), items(row)])
    return table(in_language(heads, language).split(" | "), rows)


def report(language: str) -> str:
    """All rows of the report of the included weights, beside the quick budget's if there is one."""
    quick_rows = report_rows("tiny_quick")
    head = ["tiny", "value", "95 % interval", "items or words"]
    if quick_rows:
        head += ["quick budget", "95 % interval", "items or words"]
    tables = []
    for caption, beginnings in REPORT_TABLES.items():
        rows = []
        for name, row in report_rows("tiny").items():
            if not name.startswith(beginnings):
                continue
            cells = [f"`{name}`", value_of(name, row), interval_of(name, row), items(row)]
            if quick_rows:
                quick = quick_rows.get(name, {"value": None})
                cells += [value_of(name, quick), interval_of(name, quick), items(quick)]
            rows.append(cells)
        tables.append(f"{caption}:\n\n{table(head, rows)}\n")
    measured = results()["report"]["tiny"]
    times = f"Measured in {measured['measured_seconds']} s on {measured['hardware']}."
    return f"{''.join(tables)}{times}\n"


def held_out_speakers(language: str) -> str:
    """Right answers about each speaker who was left out of the tuning, before and after it."""
    measured = results()["held_out_speakers"]
    rows = []
    for name, row in measured.items():
        low, high = Metric(name, row["after"], row["items"]).interval()
        cells = [percent(row["before"]), percent(row["after"]), f"{low:.1%} to {high:.1%}"]
        rows.append([name, *cells, str(row["items"])])
    return table(["speaker left out", "before", "after", "95 % interval", "recordings"], rows)


def report_small(language: str) -> str:
    """The report of small beside tiny's."""
    rows = []
    for name, small in report_rows("small").items():
        tiny = report_rows("tiny").get(name)
        value = value_of(name, tiny) if tiny else ""
        rows.append([f"`{name}`", value, value_of(name, small), interval_of(name, small)])
    return table(["", "tiny", "small", "95 % interval of small"], rows)


def stream(language: str) -> str:
    """What bench stream measured."""
    measured = results()["stream"]
    rows = [[f"`{name}`", f"{measured[name]:.3g}", text] for name, text in STREAM_ROWS.items()]
    return table(["streaming", "value", "meaning"], rows)


def stream_stages(language: str) -> str:
    rows = [
        [STREAM_STAGES[name], str(times["predicted"]), str(times["measured"])]
        for name, times in results()["stream_stages_ms"].items()
    ]
    return table(["until", "predicted, ms", "measured, ms"], rows)


def stream_schedules(language: str) -> str:
    rows = [
        [name, str(row["codes"]), f"{row['mel_distance']:.3f}"]
        for name, row in results()["stream_schedules"].items()
    ]
    head = ["schedule", "codes before the first audio", "mel distance to the whole utterance"]
    return table(head, rows)


def latency(language: str) -> str:
    """What bench first measured, one column a model and device."""
    columns = results()["first"]
    head = [""]
    for column in columns:
        device = column["device"]
        device = DEVICES_IN_CHINESE[device] if language == "zh" else device
        head.append(
            in_language((f"{column['model']}, {device}", f"{column['model']}，{device}"), language)
        )
    rows = []
    for key, texts in LATENCY_ROWS.items():
        values = [three_digits(column[key]) for column in columns]
        rows.append([in_language(texts, language), *values])
    return table(head, rows)


def three_digits(value: float) -> str:
    """A positive number to three digits, without an exponent."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:.0f}" if rounded >= 100 else f"{rounded:g}"


def serving(language: str) -> str:
    """What bench serve measured, a column for each number of clients; nothing before that."""
    measured = results().get("serving")
    if measured is None:
        return ""
    intro = (
        f"`python -m minomni bench serve`, tiny on two {PROCESSORS[measured['processor']]} cores, "
        "server and clients on the same machine; the question is "
        '"say the red circle is above the blue square":\n\n'
    )
    head = ["", *("1 client" if count == 1 else f"{count} clients" for count in CLIENTS)]
    rows = [
        [text, *(three_digits(measured[f"{key}_{count}"]) for count in CLIENTS)]
        for key, text in SERVING_ROWS.items()
    ]
    return intro + table(head, rows)


# What others publish, for the paragraph on the server; results.md says more.
ISSUE = "[issue 354](https://github.com/vllm-project/vllm-omni/issues/354)"
OTHERS = {
    "en": (
        f" Published for vllm-omni: Qwen2.5-Omni with 16.8 tokens and 20.7 codes per second, "
        f"11.25 s for one answer ({ISSUE})."
    ),
    "zh": (
        f"vllm-omni 的公开数据：Qwen2.5-Omni 每秒 16.8 个 token、20.7 个语音码，一个回答共 11.25 秒"
        f"（{ISSUE}）。"
    ),
}
# Of measure_page.py, what the documents show.
PAGE_KEYS = (
    "questions",
    "median_ms",
    "least_ms",
    "most_ms",
    "speech_s",
    "answers_with_gaps",
    "gaps_ms",
)


def serving_keys() -> list[str]:
    """The rows of bench serve that the documents show."""
    keys = [f"{key}_{count}" for key in SERVING_ROWS for count in CLIENTS]
    return [*keys, "spoken_first_audio_ms", "open_first_audio_ms"]


def page(language: str) -> str:
    """What measure_page.py measured; nothing before that."""
    measured = results().get("page")
    if measured is None:
        return ""
    return (
        f"On two {PROCESSORS[measured['processor']]} cores, without other work, "
        f"{measured['questions']} questions of `tests/measure_page.py` took "
        f"{measured['least_ms']:.0f} to {measured['most_ms']:.0f} ms, median "
        f"{measured['median_ms']:.0f}.{gaps(measured)}\n"
    )


def gaps(measured: dict) -> str:
    """Silence between the chunks of the answers; nothing before it was measured."""
    if "gaps_ms" not in measured:
        return ""
    speech = f" The page played {measured['speech_s']:.0f} s of speech"
    if not measured["answers_with_gaps"]:
        return f"{speech} without a gap."
    return (
        f"{speech}; {measured['answers_with_gaps']} of the answers had gaps, "
        f"{measured['gaps_ms']:.0f} ms in all."
    )


def page_sentence(language: str) -> str:
    """First sound of the page, for a paragraph; nothing before it was measured."""
    measured = results().get("page")
    if measured is None:
        return ""
    first = round(measured["median_ms"])
    count = measured["questions"]
    reason = "notebooks/results.md#the-server"
    if language == "zh":
        return (
            f"网页在说完问题后 {first} 毫秒播放第一个采样（{count} 次的中位数，[原因]({reason})）。"
        )
    return (
        f" The page plays the first sample {first} ms after a spoken question (median of {count}, "
        f"[why not sooner]({reason}))."
    )


def served(language: str) -> str:
    """The server in one paragraph; nothing before it was measured."""
    measured = results().get("serving")
    if measured is None:
        return ""
    processor = PROCESSORS[measured["processor"]]
    rates = [f"{measured[f'speech_requests_per_s_{count}']:.2g}" for count in CLIENTS]
    texts = [f"{measured[f'text_requests_per_s_{count}']:.2g}" for count in CLIENTS]
    held = round(measured["spoken_first_audio_ms"])
    opened = round(measured["open_first_audio_ms"])
    if language == "zh":
        return (
            f"`minomni bench serve`，tiny，双核 {processor}："
            f"1 / 4 / 16 个客户端同时提问时，每秒完成 "
            f"{' / '.join(texts)} 个文字回答、{' / '.join(rates)} 个语音回答；"
            f"客户端在说完问题后 {held} 毫秒收到第一段音频，开放麦克风为 {opened} 毫秒"
            f"（其中 500 毫秒用于等待停顿）。{page_sentence(language)}{OTHERS[language]}\n"
        )
    return (
        f"`minomni bench serve`, tiny on two {processor} cores: "
        f"{' / '.join(texts)} text answers and {' / '.join(rates)} spoken answers per second to "
        f"1 / 4 / 16 clients at once. A client receives the first audio {held} ms after the end "
        f"of a spoken question, and after {opened} ms with an open microphone, which waits for a "
        f"pause of 500 ms."
        f"{page_sentence(language)}{OTHERS[language]}\n"
    )


def answer(language: str) -> str:
    """What bench answer measured; nothing before that."""
    measured = results().get("answer")
    if measured is None:
        return ""
    rows = [[text, three_digits(measured[key])] for key, text in ANSWER_ROWS.items()]
    return table(["7B, int4, two cores", "value"], rows)


def answered(language: str) -> str:
    """The same in one paragraph."""
    measured = results().get("answer")
    if measured is None:
        return ""
    load_s = round(measured["load_s"])
    memory, tokens, limit, codes, copy, token2wav = (
        three_digits(measured[key])
        for key in (
            "peak_gib",
            "tokens_per_s",
            "tokens_per_s_limit",
            "codes_per_s",
            "copy_gb_per_s",
            "token2wav_s",
        )
    )
    if language == "zh":
        return (
            f"没有 GPU 也能回答：`minomni bench answer`，7B 规模、随机权重、int4，双核，"
            f"内存限制 12 GiB："
            f"{load_s} 秒加载 22.4 GB，进程最多占用 {memory} GiB，每秒 {tokens} 个文字 token"
            f"（内存复制带宽 {copy} GB/s，只算读权重可达 {limit} 个）、{codes} 个语音编码，"
            f"一秒语音的合成需 {token2wav} 秒。{beside_transformers(language)}\n"
        )
    return (
        f"It answers without a GPU too. `minomni bench answer`, random weights of the 7B in int4, "
        f"two cores, memory limited to 12 GiB: 22.4 GB load in {load_s} s, the process takes at "
        f"most {memory} GiB, and text, an image and audio are answered with {tokens} text tokens a "
        f"second ({limit} if a step only read its weights at {copy} GB/s) and {codes} speech codes "
        f"a second, of which a second of speech takes {token2wav} s to make."
        f"{beside_transformers(language)}\n"
    )


def beside_transformers(language: str) -> str:
    """Some parts beside transformers, in one sentence; nothing before they were measured.

    Of the first run that is stored.
    """
    runs = list(results().get("parts", {}).values())
    if not runs:
        return ""
    machine, rows = runs[0]["machine"], runs[0]["rows"]
    ratios = []
    for name, texts in README_PARTS.items():
        ratio = rows.get(name, {}).get("ratio")
        if ratio is not None:
            ratios.append(f"{in_language(texts, language)} {part_value(ratio)}")
    if not ratios:
        return ""
    where = "notebooks/results.md#part-by-part"
    if language == "zh":
        return (
            f"与 transformers {machine['transformers']} 的速度之比（`minomni bench parts`，"
            f"9 亿个随机权重，{machine['dtype']}，{machine['threads']} 个 "
            f"{PROCESSORS[machine['processor']]} 核）："
            f"{'，'.join(ratios)}（[逐项]({where})）。"
        )
    return (
        f" Speed divided by that of transformers {machine['transformers']} (`minomni bench parts`, "
        f"0.9 billion random weights, {machine['dtype']}, {machine['threads']} "
        f"{PROCESSORS[machine['processor']]} cores): "
        f"{', '.join(ratios)} ([part by part]({where}))."
    )


def parts(language: str) -> str:
    """Every part beside transformers, one table for each dtype; nothing before it was measured."""
    tables = []
    for dtype, run in results().get("parts", {}).items():
        machine = run["machine"]
        intro = (
            f"{dtype}, {machine['threads']} {PROCESSORS[machine['processor']]} cores, a copy at "
            f"{machine['copy_gb_per_s']:.3g} GB/s, matrix products at {machine['gflops']:.3g} "
            f"GFLOP/s, PyTorch {machine['torch']}, transformers {machine['transformers']}:\n\n"
        )
        backends = [
            backend for backend in BACKENDS if any(backend in row for row in run["rows"].values())
        ]
        rows = []
        for name, row in run["rows"].items():
            factor = UNITS.get(name, 1e3)
            values = [part_value(row.get(backend), factor) for backend in (*backends, "limit")]
            goal = f"{PART_GOALS[name]:g}" if name in PART_GOALS else ""
            rows.append([PART_ROWS[name], *values, part_value(row.get("ratio")), goal])
        head = ("work", *backends, "limit", f"{THEIRS} : {OURS}", "goal")
        tables.append(intro + table(head, rows))
    return "\n".join(tables)


def part_value(value: float | None, factor: float = 1.0) -> str:
    """A cell of the table of parts; empty where nothing was measured."""
    return "" if value is None else three_digits(factor * value)


def quantized(language: str) -> str:
    """Some rows of tiny's report by how it is quantized; nothing before that was measured."""
    runs = results().get("quantized", {})
    rows = []
    for name in QUANTIZED_METRICS:
        values = [run[name] for run in runs.values()]
        is_score = name.startswith("dnsmos")
        cells = [score(value) if is_score else percent(value) for value in values]
        rows.append([f"`{name}`", *cells])
    return table(["tiny, 50 items", *runs], rows) if runs else ""


def scaling(language: str) -> str:
    """A training step by one process and by several; nothing before it was measured."""
    rows = []
    for row in results().get("processes", []):
        step, speed_up = f"{row['step_ms']:.0f}", f"{row['speed_up']:.2f}"
        rows.append([row["stage"], str(row["processes"]), str(row["rows"]), step, speed_up])
    if not rows:
        return ""
    return table(["stage", "processes", "rows a step", "a step, ms", "speed-up"], rows)


ENCODER_ROWS = {  # of measure_encoder.py
    "recordings": "recordings",
    "true encoder": "tuned, codes of the true encoder",
    "learned encoder": "tuned, codes of the learned encoder",
    "untrained encoder": "tuned, codes of an encoder of random weights",
    "not tuned": "not tuned",
}


def encoder(language: str) -> str:
    """Speech tuned on the codes of each encoder, and how many of them are the true ones."""
    measured = results()["encoder"]
    rows = []
    for name, label in ENCODER_ROWS.items():
        row = measured["rows"].get(name)
        if row is None:
            continue
        share = measured["same codes on recordings"].get(name.removesuffix(" encoder"))
        same = "" if share is None else f"{share:.0%}"
        rows.append([label, percent(row["wer"]), f"{row['likeness']:.3f}", same])
    return table(["speech in the new voice", "word error rate", "similarity", "true codes"], rows)


def ablate_tmrope(language: str) -> str:
    rows = [
        [name, percent(row["value"]), interval(row), items(row)]
        for name, row in results()["ablations"]["tmrope"].items()
    ]
    return table(["which thing was there at the sound", "right", "95 % interval", "n"], rows)


def ablate_stage3(language: str) -> str:
    rows = []
    for name, row in results()["ablations"]["stage3"].items():
        after = row["after"]
        values = [percent(row["before"]), percent(after["value"])]
        rows.append([name, *values, interval(after), items(after)])
    return table(["what", "before stage 3", "after it", "95 % interval", "n"], rows)


def ablate_tuning(language: str) -> str:
    rows = [
        [name, percent(row["value"]), interval(row), items(row)]
        for name, row in results()["ablations"]["tuning"].items()
    ]
    return table(["speech", "word error rate", "95 % interval", "words"], rows)


def ablate_beta(language: str) -> str:
    measured = results()["ablations"]["beta"]
    head = ["", *(name if name == "before DPO" else f"beta {name}" for name in measured)]
    values = [percent(row["word_error"]) for row in measured.values()]
    falls = [row.get("relative_fall") for row in measured.values()]
    rows = [
        ["word error rate", *values],
        ["relative reduction", *("" if fall is None else percent(fall["value"]) for fall in falls)],
        ["95 % interval", *("" if fall is None else interval(fall) for fall in falls)],
    ]
    return table(head, rows)


def ablate_dpo(language: str) -> str:
    measured = results()["ablations"]["dpo"]
    fall = measured["relative_fall"]
    head = ["sentences", "WER before DPO", "WER after DPO", "relative reduction", "95 % interval"]
    values = [measured["before"], measured["after"], fall["value"]]
    row = [str(measured["items"]), *map(percent, values), interval(fall)]
    return table(head, [row])


def loading(language: str) -> str:
    rows = [
        [name, *(str(row[key]) for key in ("minomni", "transformers", "ratio"))]
        for name, row in results()["loading"].items()
    ]
    return table(["", "minomni", '`transformers`, `dtype="auto"`', "ratio"], rows)


def stages(language: str) -> str:
    """Steps of both budgets of tiny, and seconds and last losses of the long one."""
    heads = (
        "stage | trains | steps, quick | steps, long | seconds, long | last loss, long",
        "阶段 | 训练 | 步数（quick） | 步数（long） | 秒（long） | 最后的损失（long）",
    )
    rows = []
    for name, measurement in measured("tiny").items():
        quick = str(recipes.recipe_of(name, "tiny").steps)
        losses = ", ".join(f"{loss} {value:.3f}" for loss, value in measurement.losses.items())
        long = [str(measurement.step), f"{measurement.seconds:.0f}", losses]
        rows.append([name, in_language(STAGES[name], language), quick, *long])
    return table(in_language(heads, language).split(" | "), rows)


@cache
def parameter_counts(size: str) -> dict[str, int]:
    """Tensor name -> its number of parameters."""
    with torch.device("meta"):
        omni = Omni(config.SIZES[size])
    return {name: parameter.numel() for name, parameter in omni.named_parameters()}


def sizes(language: str) -> str:
    """Parameters and shapes of the three sizes."""
    none = in_language(("none released", "未发布"), language)
    rows = []
    for texts, prefixes in SIZE_ROWS.items():
        row = [in_language(texts, language)]
        for size in config.SIZES:
            counts = parameter_counts(size)
            count = sum(n for name, n in counts.items() if name.startswith(prefixes))
            row.append(f"{count:,}" if count else none)
        rows.append(row)
    trees = config.SIZES.values()
    layers = in_language(("layers x width", "层数 x 宽度"), language)
    shapes = {
        "Thinker": [tree.thinker.text for tree in trees],
        "Talker": [tree.talker.decoder for tree in trees],
        "DiT": [tree.token2wav.dit for tree in trees],
    }
    for name, parts in shapes.items():
        comma = in_language((", ", "，"), language)
        values = [f"{part.num_hidden_layers} x {part.hidden_size}" for part in parts]
        rows.append([f"{name}{comma}{layers}", *values])
    codes = [str(tree.token2wav.codes_per_second) for tree in trees]
    rates = [f"{tree.token2wav.sample_rate:,}" for tree in trees]
    rows.append([in_language(("codes per second", "每秒编码数"), language), *codes])
    rows.append([in_language(("speech, Hz", "语音，Hz"), language), *rates])
    return table(["", *config.SIZES], rows)


def facts(language: str) -> str:
    """The numbers of the first screen."""
    parameters = sum(parameter_counts("tiny").values())
    release = sum(parameter_counts("qwen7b").values())
    hours = results()["report"]["tiny"]["train_seconds"] / 3600
    first = round(results()["stream"]["first_audio_ms"])
    without_bf16 = round(results()["stream_avx2"]["first_audio_ms"])
    if language == "zh":
        return (
            f"- **笔记本电脑即可训练。** {parameters:,} 个参数，所有部件从随机权重开始，"
            f"双核 CPU 上训练：随附权重的各阶段合计 {hours:.1f} 小时，两个阶段同时进行；"
            f"quick 步数更短。\n"
            f"- **流式输出。** 文字与语音同时生成；文字提问后，双核 AVX-512 处理器上 {first} 毫秒、"
            f"双核 AVX2 处理器上 {without_bf16} 毫秒（形状相同的早期权重）得到第一段音频。\n"
            f"- **与官方结构相同。** 同样的类可以构建 7B（{release:,} 个参数）并读入其检查点目录，"
            f"测试逐一与官方代码比对。\n"
        )
    return (
        f"- **It trains on a laptop.** {parameters:,} parameters, every part from random weights, "
        f"on two CPU cores: encoders, language model, speech codec, Talker, DiT, vocoder, then DPO "
        f"on speech. The stages of the included model add up to {hours:.1f} hours, and two run at "
        f"a time; the quick budget is shorter.\n"
        f"- **It streams.** Text and speech are generated together. The first audio of the answer "
        f"to a typed question is there after {first} ms on two cores with AVX-512, after "
        f"{without_bf16} ms on two AVX2 cores (earlier weights of the same shapes).\n"
        f"- **It is the release's architecture.** The same classes build the 7B model ({release:,} "
        f"parameters) and read its checkpoint folder. The tests compare every part with the "
        f"official code.\n"
    )


# Of the table of unusual files, in its order; media: more than one of those that follow it.
KINDS_OF_FILES = ("output", "data", "media", "audio", "image", "video")


def unusual_files(language: str) -> str:
    """What the tests with the marker `reads` prove, by kind and then in the order of the tests."""
    return table(("kind", "file", "result"), reads_marks())


def reads_marks() -> list[tuple[str, ...]]:
    """The arguments (kind, file, result) of each marker `reads` in the tests, by kind."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for function in ast.parse(path.read_text(encoding="utf-8")).body:
            for mark in getattr(function, "decorator_list", []):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.reads":
                    found.append(tuple(ast.literal_eval(argument) for argument in mark.args))
    return sorted(found, key=lambda mark: KINDS_OF_FILES.index(mark[0]))


def chapter_table(language: str) -> str:
    return chapters.table("README_zh.md" if language == "zh" else "README.md")


BLOCKS: dict[str, Callable[[str], str]] = {
    "facts": facts,
    "chapters": chapter_table,
    "headline": headline,
    "report": report,
    "report_small": report_small,
    "stream": stream,
    "stream_stages": stream_stages,
    "stream_schedules": stream_schedules,
    "latency": latency,
    "serving": serving,
    "served": served,
    "page": page,
    "ablate_tmrope": ablate_tmrope,
    "ablate_stage3": ablate_stage3,
    "ablate_tuning": ablate_tuning,
    "ablate_beta": ablate_beta,
    "ablate_dpo": ablate_dpo,
    "held_out_speakers": held_out_speakers,
    "loading": loading,
    "answer": answer,
    "answered": answered,
    "parts": parts,
    "quantized": quantized,
    "scaling": scaling,
    "encoder": encoder,
    "stages": stages,
    "sizes": sizes,
    "unusual_files": unusual_files,
}
# Blocks of what has not been measured: the documents leave them out until then.
OPTIONAL = {  # block -> key of the stored results
    "serving": "serving",
    "served": "serving",
    "page": "page",
    "held_out_speakers": "held_out_speakers",
    "answer": "answer",
    "answered": "answer",
    "parts": "parts",
    "quantized": "quantized",
    "scaling": "processes",
}


# ---------------------------------------------------------------------------------------------
# Documents


def refreshed(text: str, language: str) -> str:
    """A document with all of its generated tables as they should be now."""
    for name in BEGIN.findall(text):
        if name not in BLOCKS:
            raise SystemExit(f"refresh_readme.py: no table is called {name!r}")
        old = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- end of {name} -->)", re.DOTALL)
        new = BLOCKS[name](language)
        text = old.sub(lambda _, new=new: new, text)
    return text


def write_documents() -> None:
    for name, language in DOCUMENTS.items():
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        path.write_text(refreshed(text, language), encoding="utf-8")


def take_report(measured: dict, size: str, stored: dict) -> None:
    """Replace the report of a model. Exits where it is not what `report` leaves in a file."""
    if "rows" not in measured:
        raise SystemExit("--report takes runs/report.json, not what `report --json` prints")
    stored["report"][size] = measured


def take_first(measured: dict, size: str, device: str, stored: dict) -> None:
    """New values of one column of the latency table."""
    column = {"model": size, "device": device, **{key: measured[key] for key in LATENCY_ROWS}}
    for i, known in enumerate(stored["first"]):
        if (known["model"], known["device"]) == (size, device):
            stored["first"][i] = column
            return
    stored["first"].append(column)


def pretty(value, indent: int = 0) -> str:
    """JSON in which an object stands on one line where it fits."""
    flat = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or len(flat) + indent < 96:
        return flat
    pad = " " * (indent + 1)
    if isinstance(value, dict):
        lines = [f"{pad}{json.dumps(key)}: {pretty(x, indent + 1)}" for key, x in value.items()]
        opening, closing = "{", "}"
    else:
        lines = [f"{pad}{pretty(x, indent + 1)}" for x in value]
        opening, closing = "[", "]"
    return "\n".join([opening, ",\n".join(lines), " " * indent + closing])


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the generated tables of the documents.")
    parser.add_argument("--report", type=Path, help="runs/report.json of `minomni report`")
    parser.add_argument("--stream", type=Path, help="output of `minomni bench stream --json`")
    parser.add_argument("--avx2", action="store_true", help="--stream is of two AVX2 cores")
    parser.add_argument("--first", type=Path, help="output of `minomni bench first --json`")
    parser.add_argument("--serve", type=Path, help="output of `minomni bench serve --json`")
    parser.add_argument("--page", type=Path, help="output of tests/measure_page.py --json")
    parser.add_argument(
        "--answer",
        type=Path,
        help="output of `minomni bench answer --json` with the 7B in int4 within 12 GiB",
    )
    parser.add_argument("--parts", type=Path, help="output of `minomni bench parts --json`")
    parser.add_argument("--quantized", type=Path, help="output of `minomni report --json`")
    parser.add_argument("--method", default="none", help="of --quantized, as its column says it")
    parser.add_argument("--processes", type=Path, help="output of `minomni bench processes --json`")
    parser.add_argument("--encoder", type=Path, help="result.json of tests/measure_encoder.py")
    parser.add_argument("--size", default="tiny", help="of --report and --first")
    parser.add_argument("--device", default="two cores", help="of --first, as its column says it")
    arguments = parser.parse_args()
    stored = results()
    if arguments.report:
        take_report(json.loads(arguments.report.read_text()), arguments.size, stored)
    if arguments.stream:
        key = "stream_avx2" if arguments.avx2 else "stream"
        stored.setdefault(key, {}).update(json.loads(arguments.stream.read_text()))
    if arguments.first:
        measured = json.loads(arguments.first.read_text())
        take_first(measured, arguments.size, arguments.device, stored)
    if arguments.serve:
        measured = json.loads(arguments.serve.read_text())
        stored["serving"] = {key: measured[key] for key in serving_keys()}
        stored["serving"]["processor"] = torch.backends.cpu.get_cpu_capability()
    if arguments.page:
        measured = json.loads(arguments.page.read_text())
        stored["page"] = {key: measured[key] for key in PAGE_KEYS}
        stored["page"]["processor"] = torch.backends.cpu.get_cpu_capability()
    if arguments.answer:
        stored["answer"] = json.loads(arguments.answer.read_text())
    if arguments.parts:
        measured = json.loads(arguments.parts.read_text())
        stored.setdefault("parts", {})[measured["machine"]["dtype"]] = measured
    if arguments.quantized:
        measured = json.loads(arguments.quantized.read_text())
        kept = {name: measured[name] for name in QUANTIZED_METRICS}
        stored.setdefault("quantized", {})[arguments.method] = kept
    if arguments.processes:
        stored["processes"] = json.loads(arguments.processes.read_text())
    if arguments.encoder:
        for key, values in json.loads(arguments.encoder.read_text()).items():
            stored.setdefault("encoder", {}).setdefault(key, {}).update(values)
    RESULTS.write_text(pretty(stored) + "\n", encoding="utf-8")
    write_documents()


if __name__ == "__main__":
    main()
