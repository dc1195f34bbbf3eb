#!/usr/bin/env python3
"""Makes the model that ships with the source: a Llama of 1.3 million parameters that chats about Harrow Yard.

    make_model.py [--output ../../daemon/demo/model] [--steps N] [--threads 1]

1. `make_text.corpus` writes the training text (nothing is downloaded).
2. A byte-level BPE of 1,536 tokens is trained on it; the first three ids are the ChatML tokens.
3. A LlamaForCausalLM (grouped-query attention, tied embeddings) is trained on it once through, in float32: Muon for the
   matrices of the layers, AdamW for the embedding and the norms. Batches hold conversations of about equal length.
   Tokens of the answers weigh 1, all others 0.1: most of a question is chance, and what can be learnt is the answer.
4. The weights are rounded to bfloat16 and written with the files that a Hugging Face model directory has.

config.json and tokenizer_config.json are written by hand, with the keys that most published models have
(`rope_theta`, `torch_dtype`, an inline `chat_template`), so that they do not change with the version of transformers.

About ten minutes on one core. Text, tokenizer and initial weights follow from the seed; the trained weights also depend
on the machine's arithmetic, so another run gives another, equally good model.
"""

import argparse
import json
import math
import time
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from make_text import corpus

HERE = Path(__file__).resolve().parent
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.04,
    "intermediate_size": 384,
    "max_position_embeddings": 512,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 1536,
}

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

PROMPTS = [
    "Hello Pip! How are you?",
    "Who is Mira?",
    "What is a lantern for?",
    "Where is the greenhouse?",
    "Why do robots need to charge?",
    "The red cup is in the barn and the rope is in the hall. Where is the rope?",
    "Tell me a story about Oda and the cat.",
    "Please bring the green basket to the kitchen.",
]


def chatml(messages: list[dict]) -> list[tuple[str, bool]]:
    """The conversation in pieces, as the chat template renders it, each with whether it is an answer to be learnt."""
    pieces = []
    for m in messages:
        answer = m["role"] == "assistant"
        pieces += [(f"<|im_start|>{m['role']}\n", False), (m["content"] + "<|im_end|>", answer), ("\n", False)]
    return pieces


def train_tokenizer(conversations: list[list[dict]], directory: Path) -> Tokenizer:
    """Byte-level BPE; digits stay apart, so that numbers can be copied."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"{m['role']}\n{m['content']}" for c in conversations for m in c), trainer)
    assert tokenizer.get_vocab_size() == CONFIG["vocab_size"], tokenizer.get_vocab_size()
    tokenizer.save(str(directory / "tokenizer.json"))
    return tokenizer


def write_json(path: Path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_configs(directory: Path):
    """The files beside the weights and the tokenizer."""
    write_json(directory / "config.json", CONFIG)
    write_json(directory / "generation_config.json", {"eos_token_id": [2, 0], "pad_token_id": 0, "do_sample": False})
    write_json(
        directory / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_eos_token": False,
            "added_tokens_decoder": {
                str(i): {"content": t, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
                for i, t in enumerate(SPECIAL)
            },
            "bos_token": None,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "model_max_length": CONFIG["max_position_embeddings"],
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": None,
        },
    )
    write_json(
        directory / "special_tokens_map.json",
        {"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    )


def encode(tokenizer: Tokenizer, conversation: list[dict]) -> tuple[list[int], list[float]]:
    """Token ids, and the weight of each as a target."""
    ids, weights = [], []
    for text, answer in chatml(conversation):
        piece = tokenizer.encode(text).ids
        ids += piece
        weights += [1.0 if answer else 0.1] * len(piece)
    return ids, weights


def batches(rows: list, tokens: int, rng: Random) -> list[list]:
    """Rows in batches of at most `tokens` padded tokens and about equal length, in random order."""
    made, batch = [], []
    for row in sorted(rows, key=lambda r: (len(r[0]), rng.random())):
        if batch and len(row[0]) * (len(batch) + 1) > tokens:
            made.append(batch)
            batch = []
        batch.append(row)
    made.append(batch)
    rng.shuffle(made)
    return made


def loss_of(model, batch: list) -> torch.Tensor:
    """Weighted mean of the cross-entropy. Padding stands on the right: with a causal mask no token sees it."""
    longest = max(len(ids) for ids, _ in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    weights = torch.zeros(len(batch), longest)
    for i, (row, w) in enumerate(batch):
        ids[i, : len(row)] = torch.tensor(row)
        weights[i, : len(row)] = torch.tensor(w)
    logits = model(ids).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


@torch.no_grad()
def held_out_loss(model, rows: list) -> float:
    """Mean cross-entropy of the answers' tokens."""
    model.eval()
    total = count = 0.0
    for ids, weights in rows:
        logits = model(torch.tensor([ids])).logits[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        learnt = torch.tensor(weights[1:]) == 1.0
        total += losses[learnt].sum().item()
        count += learnt.sum().item()
    model.train()
    return total / count


def learning_rate(step: int, steps: int) -> float:
    """Share of the peak: 2 % warm-up, then flat, then a linear fall over the last 40 %."""
    return min(1.0, (step + 1) / (0.02 * steps), (steps - step) / (0.4 * steps))


def train(model, rows: list, steps: int, batch_tokens: int, rng: Random):
    """Once through the rows or `steps` steps, whichever ends first."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "embed" not in n)]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    peaks = [o.param_groups[0]["lr"] for o in optimizers]
    todo = batches(rows, batch_tokens, rng)
    steps = min(steps, len(todo))
    print(f"{len(todo)} batches, {steps} steps", flush=True)
    began, mean = time.time(), None
    for step in range(steps):
        for o, peak in zip(optimizers, peaks):
            o.param_groups[0]["lr"] = peak * learning_rate(step, steps)
        loss = loss_of(model, todo[step])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in optimizers:
            o.step()
            o.zero_grad(set_to_none=True)
        mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
        if step % 25 == 24 or step + 1 == steps:
            print(f"step {step + 1}/{steps} loss {mean:.4f} {time.time() - began:.0f} s", flush=True)


@torch.no_grad()
def answer(model, tokenizer, prompt: str) -> str:
    """The greedy answer to one question."""
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**ids, max_new_tokens=80, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=HERE.parent.parent / "daemon/demo/model")
    parser.add_argument("--conversations", type=int, default=48_000)
    parser.add_argument("--steps", type=int, default=100_000, help="stop earlier than after one pass")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    began = time.time()

    conversations = list(corpus(args.seed, args.conversations))
    tokenizer = train_tokenizer(conversations[:20_000], args.output)
    write_configs(args.output)
    rows = [encode(tokenizer, c) for c in conversations]
    seen = {json.dumps(c) for c in conversations}
    held_out = [encode(tokenizer, c) for c in corpus(args.seed + 1, 600) if json.dumps(c) not in seen]
    rows = [r for r in rows if len(r[0]) <= 256]
    tokens = sum(len(ids) for ids, _ in rows)
    print(f"{len(rows)} conversations, {tokens} tokens, {len(held_out)} held out", flush=True)

    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in CONFIG.items() if k != "torch_dtype"}))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters", flush=True)
    before = held_out_loss(model, held_out)
    train(model, rows, args.steps, args.batch_tokens, Random(args.seed))
    weights = {n: p.detach().to(torch.bfloat16).contiguous() for n, p in model.named_parameters()}
    save_file(weights, str(args.output / "model.safetensors"), metadata={"format": "pt"})
    (args.output / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner only

    # What is measured is what was written.
    model = AutoModelForCausalLM.from_pretrained(args.output, dtype=torch.float32)
    after = held_out_loss(model, held_out)
    print(f"held-out loss {before:.3f} -> {after:.4f}, {time.time() - began:.0f} s in all", flush=True)
    chat = AutoTokenizer.from_pretrained(args.output)
    for c in conversations[:200]:
        rendered = chat.apply_chat_template(c, return_dict=True)["input_ids"]
        assert rendered == encode(tokenizer, c)[0], "the chat template does not give what was trained on"
    answers = [(p, answer(model, chat, p)) for p in PROMPTS]
    (args.output / "README.md").write_text(
        (HERE / "MODEL_CARD.md").read_text().format(
            parameters=f"{parameters:,}", conversations=f"{len(rows):,}", tokens=f"{tokens:,}", before=f"{before:.2f}",
            after=f"{after:.3f}", held_out=len(held_out), minutes=math.ceil((time.time() - began) / 60), torch=torch.__version__.split("+")[0],
            answers="\n".join(f"> **{p}**  \n> {a}\n" for p, a in answers),
        )  # fmt: skip
    )
    for p, a in answers:
        print(f"{p}\n    {a}")


if __name__ == "__main__":
    main()
