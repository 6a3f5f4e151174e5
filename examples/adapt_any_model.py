"""READ on an ordinary Hugging Face model: adapt, train, save, load, generate.

    python examples/adapt_any_model.py                                # a small random GPT-2, no downloads
    python examples/adapt_any_model.py --model Qwen/Qwen2.5-0.5B      # any causal model whose family READ knows
    python examples/adapt_any_model.py --cell lstm --r 8 --target_modules c_proj c_fc

The task is made up and needs memory: sequences repeat a short pattern of random tokens, and each next token is the one
that stood a pattern's length before. Only the adapter is trained.
"""

import argparse
import tempfile

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from peft_read import READConfig  # this import registers READ with peft


def base_model(name: str | None) -> torch.nn.Module:
    """The model that is adapted; the random one is the same in every process."""
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name)
    torch.manual_seed(0)
    tokens = {"vocab_size": 32, "bos_token_id": None, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(**tokens, n_embd=64, n_layer=2, n_head=4, n_positions=64))


def patterns(batch: int, vocabulary: int, period: int = 2, length: int = 24) -> torch.Tensor:
    """Sequences (B, T) that repeat a random pattern."""
    return torch.randint(vocabulary, (batch, period)).repeat(1, length // period)


def main(arguments: list[str] | None = None) -> dict:
    """Train for some steps; returns the first and the last loss and whether the reloaded adapter is the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="a causal language model of the Hub, or a folder; a small random one if absent"
    )
    parser.add_argument("--cell", default="rnn", choices=["rnn", "gru", "lstm", "none"])
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--target_modules", nargs="+", help="the model's feed-forward blocks if absent")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    options = parser.parse_args(arguments)

    config = READConfig(r=options.r, cell=options.cell, target_modules=options.target_modules, task_type="CAUSAL_LM")
    model = get_peft_model(base_model(options.model), config)
    model.print_trainable_parameters()

    vocabulary = 8
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=options.learning_rate)
    torch.manual_seed(1)
    losses = []
    for step in range(options.steps):
        ids = patterns(16, vocabulary)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 25 == 0 or step == options.steps - 1:
            print(f"step {step:4d}  loss {loss.item():.3f}")

    model.eval()
    prompt = patterns(2, vocabulary)[:, :8]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # adapter_model.safetensors, adapter_config.json, README.md
        loaded = PeftModel.from_pretrained(base_model(options.model), folder).eval()
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    tokens, again = (one.generate(input_ids=prompt, **settings) for one in (model, loaded))
    print("prompt and continuation:", tokens[0].tolist())
    print("the reloaded adapter generates the same:", torch.equal(tokens, again))
    return {"first_loss": losses[0], "last_loss": losses[-1], "same": torch.equal(tokens, again)}


if __name__ == "__main__":
    main()
