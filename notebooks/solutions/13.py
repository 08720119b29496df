"""Solutions of the exercises of notebook 13, and the code that it folds. The graders are in the
notebook.
"""

import contextlib
import io
import json

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


def kept(losses, patience):
    best = 0
    for i, loss in enumerate(losses):
        if loss < losses[best]:
            best = i
        elif i - best >= patience:
            break
    return best


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


def my_cells(things, cells, size, hair=1.5):
    table = []
    for row in range(cells):
        for column in range(cells):
            said = "-"
            for _, _, (x, y), _ in things:
                near = [(v - hair) // size <= at <= (v + hair) // size
                        for v, at in ((x, column), (y, row))]
                said = "?" if all(near) and said == "-" else said
            for color, shape, (x, y), _ in things:
                if (int(x // size), int(y // size)) == (column, row):
                    said = f"{color} {shape}"
            table.append(said)
    return table
