#!/usr/bin/env python3
"""Writes the fine-tuning task of `finetuned demo`: what someone says to the robot -> the intent it should act on.

    make_demo_data.py [--seed 11] [--output ../../daemon/demo]

Writes data/train.jsonl, data/eval.jsonl and prompts.json (three questions that are shown before and after).

The base model has met all of these words and answers such requests in polite sentences; it has never seen an intent.
The held-out rows ask for more than memory: no answer of theirs stands in the training file, and in one out of three
the thing itself (a lantern, a jar, a shovel, a pillow) is never the object of a training row.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from random import Random

from commands import Command, command

HERE = Path(__file__).resolve().parent
TRAIN_ROWS, EVAL_ROWS = 600, 48
HELD_OUT_THINGS = {"lantern", "jar", "shovel", "pillow"}

SHOWCASE = [
    ("Please bring the red lantern to the kitchen.", '{"action":"bring","object":"red lantern","to":"kitchen"}'),
    ("Could you wait in the barn for seven minutes?", '{"action":"wait","in":"barn","minutes":7}'),
    ("Pip, tell Mira to feed the hens.", '{"action":"remind","person":"Mira","task":"feed the hens"}'),
]


def intent_text(c: Command) -> str:
    """The intent as one line of JSON without spaces: fewer tokens, less time on the robot."""
    return json.dumps(c.intent, separators=(",", ":"))


def row(c: Command) -> str:
    return json.dumps({"messages": [{"role": "user", "content": c.utterance}, {"role": "assistant", "content": intent_text(c)}]}) + "\n"


def make(seed: int) -> tuple[list[Command], list[Command]]:
    """Training and held-out commands: no utterance and no intent twice or in both."""
    rng = Random(seed)
    said = {prompt for prompt, _ in SHOWCASE}
    meant = {intent for _, intent in SHOWCASE}

    def fresh(accept) -> Command:
        while True:
            c = command(rng)
            if accept(c) and c.utterance not in said and intent_text(c) not in meant:
                said.add(c.utterance)
                return c

    def unmeant(accept) -> Command:
        c = fresh(accept)
        meant.add(intent_text(c))
        return c

    # The held-out rows first; their intents are then barred from the training rows, which may share theirs.
    per_action = Counter()

    def balanced(c: Command) -> bool:
        return per_action[c.intent["action"]] <= EVAL_ROWS // 12

    held_out = []
    for i in range(EVAL_ROWS):
        c = unmeant(lambda c: c.thing in HELD_OUT_THINGS if i % 3 == 0 else c.thing not in HELD_OUT_THINGS and balanced(c))
        per_action[c.intent["action"]] += 1
        held_out.append(c)
    train = [fresh(lambda c: c.thing not in HELD_OUT_THINGS) for _ in range(TRAIN_ROWS)]
    rng.shuffle(held_out)
    return train, held_out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--output", type=Path, default=HERE.parent.parent / "daemon/demo")
    args = parser.parse_args()
    train, held_out = make(args.seed)
    (args.output / "data").mkdir(parents=True, exist_ok=True)
    (args.output / "data/train.jsonl").write_text("".join(map(row, train)))
    (args.output / "data/eval.jsonl").write_text("".join(map(row, held_out)))
    prompts = [{"prompt": p, "expected": e} for p, e in SHOWCASE]
    (args.output / "prompts.json").write_text(json.dumps(prompts, indent=2) + "\n")
    actions = Counter(c.intent["action"] for c in train)
    print(f"{len(train)} training rows, {len(held_out)} held out; training rows by action: {dict(actions)}")


if __name__ == "__main__":
    main()
