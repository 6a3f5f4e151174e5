"""READ and PVLA on a current video-language model, Qwen2.5-VL.

    python examples/adapt_video_language_model.py    # small random weights, no download
    python examples/adapt_video_language_model.py --model Qwen/Qwen2.5-VL-3B-Instruct

Frames and words stand in one sequence; the token ids say which is which, and PVLA finds them in the configuration.
The video is noise and its text the same every time: the example shows how the parts fit, not what can be learnt.
"""

import argparse

import torch
from peft import get_peft_model
from transformers import AutoConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from peft_read import Aligner, PVLAConfig, READConfig


def small_config() -> Qwen2_5_VLConfig:
    text = {
        "vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32,
        "patch_size": 4, "fullatt_block_indexes": [0], "window_size": 16,
    }  # fmt: skip
    tokens = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 8, "vision_end_token_id": 9}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)


def one_video(config: Qwen2_5_VLConfig, steps: int = 4, side: int = 4) -> dict[str, torch.Tensor]:
    """A video of `steps` steps of time and side x side patches, and three words."""
    vision = config.vision_config
    frame_tokens = steps * (side // vision.spatial_merge_size) ** 2
    video = [config.vision_start_token_id, *[config.video_token_id] * frame_tokens, config.vision_end_token_id]
    ids = torch.tensor([[*video, 20, 21, 22]])
    labels = ids.clone()
    labels[:, : len(video)] = -100  # the words alone are predicted
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "pixel_values_videos": torch.randn(steps * side * side, 3 * vision.temporal_patch_size * vision.patch_size**2),
        "video_grid_thw": torch.tensor([[steps, side, side]]),
        "mm_token_type_ids": 2 * (ids == config.video_token_id),
    }


def main(arguments: list[str] | None = None) -> list[float]:
    """Train for some steps; returns the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Qwen2.5-VL of the Hub, or a folder; a small random one if absent")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    if options.model is None:
        config = small_config()
        base = Qwen2_5_VLForConditionalGeneration(config)
    else:
        config = AutoConfig.from_pretrained(options.model)
        base = Qwen2_5_VLForConditionalGeneration.from_pretrained(options.model)
    model = get_peft_model(base, READConfig(r=4, task_type="CAUSAL_LM"))
    model.print_trainable_parameters()

    aligner = Aligner(model, PVLAConfig(weight=0.1))
    batch = one_video(config)
    print(aligner.describe(model, batch))

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(options.steps):
        with aligner.record() as recording:
            outputs = model(**batch)
        pvla = aligner.loss(recording, batch, outputs)
        (outputs.loss + pvla).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(outputs.loss.detach()))
        if step % 5 == 0 or step == options.steps - 1:
            print(f"step {step:3d}  task loss {losses[-1]:.3f}  weighted PVLA {float(pvla.detach()):.4f}")
    return losses


if __name__ == "__main__":
    main()
