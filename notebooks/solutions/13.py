"""Solutions of the exercises of notebook 13, and the code that it folds. The graders are in the
notebook.
"""

import contextlib
import io
import json

import torch

import minomni
from minomni.data import jsonl
from minomni.train import finetune
from minomni.train.loop import Recipe, train


def my_targets(turns):
    marked = []
    for prompt, answer in turns:
        marked += [-100] * len(prompt) + answer
    return marked[1:] + [-100]


def my_mean_loss(parts):
    total, count = 0.0, 0
    for logits, targets in parts:
        counted = targets != -100
        log_probs = logits[counted].log_softmax(-1)
        total = total - log_probs.gather(1, targets[counted][:, None]).sum()
        count += int(counted.sum())
    return total / count


def my_run(weights, mean, first, last, seed):
    for number in range(first, last):
        torch.manual_seed(seed * 1_000_003 + number)
        gradient = weights - torch.randn(2)
        mean = 0.9 * mean + gradient
        weights = weights - 0.1 * mean
    return weights, mean


def my_stop(held_out, patience):
    best = 0
    for report, loss in enumerate(held_out):
        if loss < held_out[best]:
            best = report
        if report - best >= patience:
            return best, report + 1
    return best, len(held_out)


def as_row(question, answer):
    return {"messages": [{"role": "user", "content": question},
                         {"role": "assistant", "content": answer}]}


def tune(home, pairs, rate=2e-3, steps=30, batch=16, name="mine"):
    """What `train tiny --data` does, with fewer steps -> the tuned model, its loss."""
    path = home / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps(as_row(*pair)) for pair in pairs))
    omni = minomni.load("tiny")
    rows = jsonl.validate(path, omni)
    tuning = Recipe(steps, batch, rate, warmup=4)
    with contextlib.redirect_stdout(io.StringIO()):
        train(finetune.FinetuneChatStage(omni, tuning, home, 0, rows), home / name)
    log = (home / name / "log.jsonl").read_text().splitlines()
    return omni.eval(), json.loads(log[-1])["text"]


def right(omni, pairs):
    """How many questions get exactly the expected answer."""
    messages = [[{"role": "user", "content": question}] for question, _ in pairs]
    texts = omni.respond(messages, speech=False).text
    return sum(text == answer for text, (_, answer) in zip(texts, pairs))
