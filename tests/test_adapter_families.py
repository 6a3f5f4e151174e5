"""READ on the model families of today: default targets, packed images, videos, hybrids, idle parameters."""

import copy
import warnings

import pytest
import torch
import transformers as t
from peft import PeftModel, get_peft_model
from torch import nn

from peft_read import READConfig
from peft_read.adapter import masks
from peft_read.adapter.targets import default_targets, feed_forward_endings

BLOCKS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**BLOCKS, "num_key_value_heads": 2, "vocab_size": 60, "pad_token_id": 0, "initializer_range": 0.2}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ViT = {**BLOCKS, "image_size": 32, "patch_size": 8, "initializer_range": 0.2}


def filled(model, **settings):
    """A model with READ whose weights are all random, so that every part of it can be seen."""
    model = get_peft_model(model, READConfig(init_weights=False, **settings)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "readapter_" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.5)
    return model


def llava(vision="clip_vision_model"):
    torch.manual_seed(0)
    text = t.AutoConfig.for_model("llama", **TEXT)
    vision = t.AutoConfig.for_model(vision, **ViT)
    config = t.LlavaConfig(vision_config=vision, text_config=text, image_token_index=5)
    return t.LlavaForConditionalGeneration(config).eval()


def mistral3():
    torch.manual_seed(0)
    vision = t.PixtralVisionConfig(**ViT, head_dim=8)
    text = t.MistralConfig(**TEXT, head_dim=8)
    config = t.Mistral3Config(vision_config=vision, text_config=text, image_token_index=5, spatial_merge_size=2)
    return t.Mistral3ForConditionalGeneration(config).eval()


def qwen2_vl():
    torch.manual_seed(0)
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = {**TEXT, "rope_parameters": rope}
    tokens = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7}
    config = t.Qwen2VLConfig(text_config=text, vision_config={**vision, "temporal_patch_size": 2}, **tokens)
    return t.Qwen2VLForConditionalGeneration(config).eval()


def names(model, part=None):
    config = READConfig(target_modules=part)
    return sorted(get_peft_model(model, config).base_model.targeted_module_names)


def causal(kind, **settings):
    torch.manual_seed(0)
    return t.AutoModelForCausalLM.from_config(t.AutoConfig.for_model(kind, **{**TEXT, **settings})).eval()


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("olmo3", {}, ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]),
        ("glm4", {"head_dim": 8}, ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]),
        ("gpt_neox", {}, ["gpt_neox.layers.0.mlp.dense_4h_to_h", "gpt_neox.layers.1.mlp.dense_4h_to_h"]),
        ("qwen3_moe", {**EXPERTS, "head_dim": 8}, ["model.layers.0.mlp", "model.layers.1.mlp"]),
        ("mixtral", EXPERTS, ["model.layers.0.mlp", "model.layers.1.mlp"]),
        ("gpt_oss", {**EXPERTS, "head_dim": 8}, ["model.layers.0.mlp", "model.layers.1.mlp"]),
    ],
)
def test_the_last_module_of_each_feed_forward_block_is_found(kind, settings, expected):
    model = causal(kind, **settings)
    assert names(model) == expected
    assert {ending.width for ending in feed_forward_endings(model)} == {32}


def test_a_mixture_of_experts_is_adapted_as_a_whole_and_survives_saving(tmp_path):
    ids = torch.randint(2, 60, (2, 7))
    base = causal("qwen3_moe", **EXPERTS, head_dim=8)
    before = base(ids).logits
    assert torch.equal(get_peft_model(causal("qwen3_moe", **EXPERTS, head_dim=8), READConfig())(ids).logits, before)
    model = filled(base)
    after = model(ids).logits
    assert (after - before).abs().max() > 1e-2
    alone = torch.cat([model(row[None]).logits for row in ids])
    torch.testing.assert_close(after, alone, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(causal("qwen3_moe", **EXPERTS, head_dim=8), tmp_path).eval()
    torch.testing.assert_close(loaded(ids).logits, after, rtol=0, atol=1e-5)
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    cached = loaded.generate(input_ids=ids, **settings)
    assert torch.equal(cached, loaded.generate(input_ids=ids, **settings, use_cache=False))


def test_the_language_model_is_adapted_unless_another_part_is_asked_for():
    text = [f"model.language_model.layers.{i}.mlp.down_proj" for i in range(2)]
    images = [f"model.vision_tower.encoder.layers.{i}.mlp.fc2" for i in range(2)]
    assert names(llava()) == names(llava(), "language") == text
    assert names(llava(), "vision") == images
    assert names(llava(), "all") == sorted(text + images)
    with pytest.raises(ValueError, match=r"no feed-forward blocks in a part 'audio', only in 'language', 'vision'"):
        names(llava(), "audio")


def test_an_unused_pooling_head_is_not_among_the_defaults():
    vision = get_peft_model(t.SiglipVisionModel(t.SiglipVisionConfig(**ViT)), READConfig()).base_model
    assert sorted(name.split("layers.")[-1] for name in vision.targeted_module_names) == ["0.mlp.fc2", "1.mlp.fc2"]


def test_names_are_as_short_as_they_can_be_and_lists_where_layers_are_chosen():
    bert = t.BertModel(t.BertConfig(**BLOCKS, vocab_size=20))
    assert default_targets(causal("llama")) == {"down_proj"}
    paths = {f"encoder.layer.{i}.output.dense" for i in range(2)}
    assert default_targets(bert, as_list=True) == paths
    model = get_peft_model(bert, READConfig(layers_to_transform=[1], layers_pattern="layer"))
    assert model.base_model.targeted_module_names == ["encoder.layer.1.output.dense"]


def test_without_feed_forward_blocks_the_linear_layers_are_named():
    config = t.MambaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(
        ValueError, match=r"Please specify `target_modules`.*'mamba'.*'backbone.layers.\*.mixer.out_proj'"
    ):
        get_peft_model(t.MambaForCausalLM(config), READConfig())


def pictures(count=2, seed=1):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def joined(images, placeholders):
    ids = torch.randint(10, 60, (2, placeholders + 4), generator=torch.Generator().manual_seed(2))
    ids[:, 2 : 2 + placeholders] = 5
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": images}


@pytest.mark.parametrize("targets", ["vision", "all-linear"])
def test_images_that_a_tower_packs_into_one_row_stay_apart(targets):
    model = filled(mistral3(), target_modules=targets)
    sizes = {"image_sizes": torch.tensor([[32, 32]] * 2)}
    one, other = pictures(), pictures()
    other[0] = pictures(seed=7)[0]
    with torch.no_grad():
        first, second = (model(**joined(images, 4), **sizes).logits for images in (one, other))
        alone = joined(one, 4)
        alone = model(**{k: v[1:] for k, v in alone.items()}, image_sizes=sizes["image_sizes"][1:]).logits
    assert (first[0] - second[0]).abs().max() > 1e-3  # the image has an effect
    assert torch.equal(first[1], second[1])
    torch.testing.assert_close(first[1:], alone, rtol=0, atol=1e-5)


def test_packed_images_without_a_mark_between_them_are_refused():
    class Tower(t.PreTrainedModel):
        """Packs the images of a batch and says nothing about it."""

        config_class = t.ViTConfig
        main_input_name = "pixel_values"

        def __init__(self, config):
            super().__init__(config)
            block = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
            self.layers = nn.ModuleList([block])

        def forward(self, pixel_values):
            packed = pixel_values.flatten(0, 1)[None]
            for layer in self.layers:
                packed = layer(packed)
            return packed

    model = get_peft_model(Tower(t.ViTConfig()), READConfig(target_modules=["layers.0.1"])).eval()
    model(pixel_values=torch.randn(1, 5, 8))
    with pytest.raises(ValueError, match="may follow each other, and it is unknown where"):
        model(pixel_values=torch.randn(2, 5, 8))


def qwen_inputs(grid, seed=3):
    """Patches, and a text with a placeholder for each merged patch of the videos."""
    patches = torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 16, generator=torch.Generator().manual_seed(seed))
    return patches, grid


def test_the_frames_of_a_video_are_one_sequence_and_videos_are_apart():
    model = filled(qwen2_vl(), target_modules="vision")
    tower = model.get_base_model().model.visual
    grid = torch.tensor([[2, 4, 4], [3, 2, 4]])  # two videos: 2 frames of 16 patches, 3 frames of 8
    patches, _ = qwen_inputs(grid)
    with torch.no_grad():
        whole = tower(patches, grid).last_hidden_state
        parts = [tower(p, g[None]).last_hidden_state for p, g in zip(patches.split([32, 24]), grid, strict=True)]
        torch.testing.assert_close(whole, torch.cat(parts), rtol=0, atol=1e-5)
        with model.disable_adapter():
            base = tower(patches, grid).last_hidden_state
        changed = patches.clone()
        changed[0] += 1.0  # a patch of the first frame of the first video
        effect = (tower(changed, grid).last_hidden_state - whole).abs().amax(-1)
        with model.disable_adapter():
            base_effect = (tower(changed, grid).last_hidden_state - base).abs().amax(-1)
    assert base_effect[16:].max() == 0  # attention stays in the frame
    assert effect[16:32].min() > 0 and effect[32:].max() == 0  # the recurrence runs on to the next frame, no further


def test_frames_given_as_a_video_to_an_image_tower_are_one_sequence():
    torch.manual_seed(0)
    vision, text = t.CLIPVisionConfig(**ViT), t.LlamaConfig(**TEXT)
    tokens = {"image_token_index": 5, "video_token_index": 6, "spatial_pool_stride": 2}
    config = t.LlavaNextVideoConfig(vision_config=vision, text_config=text, **tokens)
    model = filled(t.LlavaNextVideoForConditionalGeneration(config).eval(), target_modules="vision")
    inner = model.get_base_model().model
    seen = []
    inner.vision_tower.encoder.layers[0].mlp.fc2.register_forward_hook(lambda m, a, out: seen.append(out))
    videos = torch.randn(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(4))  # (B, F, C, H, W)
    changed = videos.clone()
    changed[0, 0] += 1.0
    ids = torch.randint(10, 60, (2, 18), generator=torch.Generator().manual_seed(2))
    ids[:, 2:14] = 6
    with torch.no_grad():
        for v in (videos, changed):
            model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values_videos=v)
    effect = (seen[0] - seen[1]).abs().amax((1, 2)).view(2, 3)  # (B, F)
    assert (effect[0, :2] > 0).all() and (effect[1] == 0).all()  # the effect fades over 16 patches a frame


@pytest.mark.parametrize("use_bias", [True, False])
def test_nothing_is_added_at_padding_so_hybrids_carry_nothing_on(use_bias):
    sizes = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
    sizes |= {"linear_value_head_dim": 8, "head_dim": 8, "shared_expert_intermediate_size": 32, **EXPERTS}
    base = causal("qwen3_next", **sizes, num_hidden_layers=4, initializer_range=0.1)
    model = filled(base, target_modules="all-linear", use_bias=use_bias)
    ids = torch.randint(10, 60, (1, 7), generator=torch.Generator().manual_seed(1))
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), ids), dim=1)
    mask = (torch.arange(10)[None] >= 3).long()
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        result = model(input_ids=padded, attention_mask=mask).logits[:, 3:]
    torch.testing.assert_close(result, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("cell", ["rnn", "none"])
def test_the_output_at_padding_is_the_base_layers(cell):
    model = filled(causal("llama"), cell=cell)
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    seen = []
    layer.register_forward_hook(lambda m, a, out: seen.append((m.base_layer(a[0]), out)))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    model(input_ids=torch.randint(2, 60, (2, 5)), attention_mask=mask)
    (base, adapted), real = seen[0], mask.bool()
    assert torch.equal(base[~real], adapted[~real]) and (base[real] != adapted[real]).any()


def test_feature_maps_are_read_image_by_image():
    layer = get_peft_model(nn.Sequential(nn.Linear(6, 6)), READConfig(target_modules=["0"], init_weights=False))
    maps = torch.randn(2, 3, 4, 6)
    torch.testing.assert_close(layer(maps), layer(maps.flatten(1, 2)).view_as(maps))


def steps(model, count, **inputs):
    """Train a few steps; the warnings about parameters without gradient."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(count):
            output = model(**inputs)
            (output.logits if "logits" in output else output.last_hidden_state).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return [str(w.message) for w in caught if "got no gradient" in str(w.message)]


def test_a_layer_that_is_never_called_is_named_once():
    config = t.MambaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, state_size=4)
    model = get_peft_model(t.MambaForCausalLM(config), READConfig(target_modules=["dt_proj", "out_proj"]))
    (message,) = steps(model, 5, input_ids=torch.randint(2, 20, (2, 5)))
    assert "Never called: 'backbone.layers.*.mixer.dt_proj'" in message and "out_proj" not in message


def test_a_layer_that_does_not_reach_the_loss_is_named():
    model = get_peft_model(llava(), READConfig(target_modules="vision"))  # it reads the last but one layer
    (message,) = steps(model, 4, **joined(pictures(), 16))
    assert "Without a way to the loss: 'model.vision_tower.encoder.layers.1.mlp.fc2'" in message


def test_a_recurrence_before_a_class_token_is_named():
    torch.manual_seed(0)
    model = get_peft_model(t.ViTForImageClassification(t.ViTConfig(**ViT)), READConfig())
    (message,) = steps(model, 5, pixel_values=pictures())
    assert "The recurrence (weight_hh) of 'vit.layers.1.mlp.fc2': only the first token" in message


def test_a_recurrence_over_single_tokens_is_named():
    torch.manual_seed(0)

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x):
            return t.modeling_outputs.BaseModelOutput(self.linear(x))

    model = get_peft_model(Rows(), READConfig(target_modules=["linear"]))
    (message,) = steps(model, 4, x=torch.randn(5, 6))
    assert "The recurrence (weight_hh) of 'linear': every sequence that it saw had one token" in message


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_model_that_trains_whole_is_not_warned_about(reentrant):
    model = get_peft_model(causal("llama"), READConfig())
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert steps(model, 5, input_ids=torch.randint(2, 60, (2, 6))) == []


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("jetmoe", {**EXPERTS, "kv_channels": 8}, ["model.layers.0.mlp", "model.layers.1.mlp"]),
        ("recurrent_gemma", {}, [f"model.layers.{i}.mlp_block.down_proj" for i in range(2)]),
        ("xlm", {"emb_dim": 32, "n_layers": 2, "n_heads": 4}, ["transformer.ffns.0.lin2", "transformer.ffns.1.lin2"]),
    ],
)  # fmt: skip
def test_attention_that_looks_like_a_feed_forward_block_is_not_adapted(kind, settings, expected):
    assert names(causal(kind, **settings)) == expected


def seq2seq(kind, **settings):
    torch.manual_seed(0)
    small = {
        "d_model": 32, "vocab_size": 60, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "init_std": 0.3,
    }  # fmt: skip
    config = t.AutoConfig.for_model(kind, **{**small, **settings})
    return t.AutoModelForSeq2SeqLM.from_config(config).eval()


def padded_logits(model, decoder_length=5):
    """The logits of one source without padding and with padding at its right."""
    generator = torch.Generator().manual_seed(3)
    source, target = (torch.randint(3, 60, (1, n), generator=generator) for n in (7, decoder_length))
    longer = torch.nn.functional.pad(source, (0, 3), value=1)
    with torch.no_grad():
        return [
            model(input_ids=ids, attention_mask=(ids != 1).long(), decoder_input_ids=target).logits
            for ids in (source, longer)
        ]


def test_global_tokens_of_a_padded_encoder_are_a_sequence_of_their_own(monkeypatch):
    model = filled(seq2seq("pegasus_x", block_size=8, num_global_tokens=5, stagger_local_blocks=False))
    torch.testing.assert_close(*padded_logits(model), rtol=0, atol=1e-4)
    filled(seq2seq("pegasus_x", block_size=8, num_global_tokens=5), target_modules="all-linear")
    same = filled(seq2seq("pegasus_x", block_size=8, num_global_tokens=16))
    with pytest.raises(ValueError, match="another sequence of the same length"):
        padded_logits(same)
    whole = torch.arange(3, 19)[None]
    monkeypatch.setattr(masks, "_none_without_padding", lambda mask: mask)  # as on CUDA
    with torch.no_grad():
        one, other = (
            same(input_ids=whole, attention_mask=mask, decoder_input_ids=whole[:, :5]).logits
            for mask in (torch.ones_like(whole), None)
        )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_padding_of_the_source_of_cross_attention_is_known_where_time_comes_first():
    settings = {"langs": ["en", "de"], "src_vocab_size": 60, "tgt_vocab_size": 60, "pad_token_id": 1}
    model = filled(seq2seq("fsmt", **settings), target_modules=r".*encoder_attn\.(k|v)_proj")
    longer = torch.nn.functional.pad(torch.full((1, 3), 7), (3, 0), value=1)
    target = torch.randint(3, 60, (1, 5), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        one, other = (
            model.base_model.model.model.decoder(
                target, states, mask, None, torch.zeros(5, 5), return_dict=True
            ).last_hidden_state
            for states, mask in _source_and_padded(longer)
        )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def _source_and_padded(ids):
    states = torch.randn(*ids.shape, 32, generator=torch.Generator().manual_seed(4))
    mask = (ids != 1).long()
    return (states[:, 3:], mask[:, 3:]), (states, mask)


def prophetnet():
    torch.manual_seed(0)
    config = t.ProphetNetConfig(
        vocab_size=60, hidden_size=32, encoder_ffn_dim=48, decoder_ffn_dim=48, num_encoder_layers=2, init_std=0.3,
        num_decoder_layers=2, num_encoder_attention_heads=4, num_decoder_attention_heads=4, ngram=2,
    )  # fmt: skip
    return t.ProphetNetForConditionalGeneration(config).eval()


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_streams_that_predict_do_not_know_the_tokens_ahead(targets):
    model = filled(prophetnet(), target_modules=targets)
    source = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(3))
    target = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(4))
    changed = target.clone()
    changed[:, 3] = (changed[:, 3] - 2) % 57 + 3
    with torch.no_grad():
        one, other = (model(input_ids=source, decoder_input_ids=ids, use_cache=False) for ids in (target, changed))
    torch.testing.assert_close(one.logits[:, :3], other.logits[:, :3], rtol=0, atol=1e-5)
    assert (one.logits[:, 3:] - other.logits[:, 3:]).abs().max() > 1e-2


def test_the_cache_of_a_decoder_with_several_streams_is_refused_by_name():
    model = filled(prophetnet())
    ids = torch.randint(3, 60, (1, 6))
    with pytest.raises(NotImplementedError, match=r"ProphetNetDecoder.*use_cache=False"):
        model.generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3, num_beams=1, use_cache=True)
    assert (
        model.generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3, num_beams=1, use_cache=False).shape[1] == 4
    )


class _Reader(nn.Module):
    """A block that attends to its text and, without padding of its own, to a protein."""

    def __init__(self):
        super().__init__()
        self.key = nn.Linear(8, 8)
        self.down = nn.Linear(8, 8)

    def forward(self, hidden_states, attention_mask=None, protein_kv_states=None, protein_batch_mask=None):
        keys = self.key(protein_kv_states) * protein_batch_mask[..., None]
        return hidden_states + self.down(hidden_states) + keys.sum(1, keepdim=True)


class _ReadingModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([_Reader(), _Reader()])

    def forward(self, inputs_embeds, attention_mask=None, protein=None, protein_mask=None):
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds, None, protein_kv_states=protein, protein_batch_mask=protein_mask)
        return inputs_embeds


def test_what_a_block_reads_beside_a_padded_text_has_its_own_length_and_mask():
    torch.manual_seed(0)
    model = filled(_ReadingModel(), target_modules=["key", "down"])
    text, protein = torch.randn(1, 5, 8), torch.randn(1, 4, 8)
    real, whole = torch.ones(1, 5), torch.ones(1, 4)
    wider = {
        "protein": torch.cat([torch.randn(1, 2, 8), protein], 1),
        "protein_mask": torch.tensor([[0.0, 0, 1, 1, 1, 1]]),
    }
    padded = torch.cat([text, torch.randn(1, 2, 8)], 1), torch.tensor([[1.0] * 5 + [0.0] * 2])
    with torch.no_grad():
        alone = model(text, attention_mask=real, protein=protein, protein_mask=whole)
        beside = model(padded[0], attention_mask=padded[1], **wider)[:, :5]
    torch.testing.assert_close(beside, alone, rtol=0, atol=1e-5)


def test_attention_with_a_layout_of_its_own_is_left_out_of_all_linear():
    torch.manual_seed(0)
    config = t.LongformerConfig(
        **BLOCKS, vocab_size=60, attention_window=4, max_position_embeddings=40, pad_token_id=1
    )
    model = filled(t.LongformerModel(config), target_modules="all-linear")
    assert not any(".self." in name for name in model.base_model.targeted_module_names)
    ids = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(3))
    alone = torch.cat([model(row[None]).last_hidden_state for row in ids])
    torch.testing.assert_close(model(ids).last_hidden_state, alone, rtol=0, atol=1e-5)


def test_blocks_that_cut_their_sequences_into_pieces_are_refused():
    bert = t.BertModel(t.BertConfig(**BLOCKS, vocab_size=20, chunk_size_feed_forward=2))
    with pytest.raises(ValueError, match=r"chunk_size_feed_forward=0"):
        get_peft_model(bert, READConfig())
    get_peft_model(bert, READConfig(cell="none"))


def test_a_part_that_is_neither_text_nor_image_is_not_a_default():
    torch.manual_seed(0)
    model = nn.Module()
    model.protein_encoder = t.BertModel(t.BertConfig(**BLOCKS, vocab_size=20))
    model.language_model = causal("llama")
    actual = {ending.part for ending in feed_forward_endings(model)}
    assert actual == {"other", "language"}


class _PackedBlock(nn.Module):
    """A block that takes a mask, so that nothing around it is a stack, and rows (N, d)."""

    def __init__(self):
        super().__init__()
        self.down = nn.Linear(8, 8)

    def forward(self, hidden_states, attention_mask=None, cu_seqlens=None):
        return hidden_states + self.down(hidden_states)


class _PackedTower(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([_PackedBlock()])

    def forward(self, pixel_values, grid_thw):
        lengths = torch.nn.functional.pad(grid_thw.prod(-1).cumsum(0), (1, 0))
        return self.layers[0](pixel_values, cu_seqlens=lengths)


def test_blocks_that_are_given_packed_rows_and_could_be_given_a_mask_know_the_images():
    torch.manual_seed(0)
    model = filled(_PackedTower(), target_modules=["down"])
    one, other = torch.randn(6, 8), torch.randn(4, 8)
    grids = torch.tensor([[1, 2, 3], [1, 2, 2]])
    with torch.no_grad():
        both = model(torch.cat([one, other]), grid_thw=grids)
        alone = [model(rows, grid_thw=grid[None]) for rows, grid in zip((one, other), grids, strict=True)]
        moved = model(torch.cat([one, other + torch.eye(4, 8)]), grid_thw=grids)
    torch.testing.assert_close(both, torch.cat(alone), rtol=0, atol=1e-6)
    changed = torch.cat([one[:1] + 1, one[1:]])
    with torch.no_grad():
        later = model(changed, grid_thw=grids[:1])[1:]
    assert (later - alone[0][1:]).abs().max() > 1e-3
    assert torch.equal(moved[:6], both[:6])


@pytest.mark.parametrize("r", [4, 12])
def test_a_model_may_change_what_read_puts_out_in_place(r):
    # Falcon adds attention's output to it. Widths up to 8 go through one operation, wider ones through several.
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
    model = t.FalconForCausalLM(t.FalconConfig(**settings, initializer_range=0.2))
    ids, gradients = torch.randint(1, 60, (2, 7)), []
    for out_of_place in (False, True):
        adapted = filled(copy.deepcopy(model), r=r)
        if out_of_place:
            for layer in adapted.modules():
                if type(layer).__name__ == "FalconMLP":
                    layer.register_forward_hook(lambda module, given, output: output.clone())
        adapted(ids).logits.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for n, p in adapted.named_parameters() if "readapter_" in n]))
    assert gradients[0].abs().max() > 0.01 and torch.allclose(*gradients, rtol=1e-4, atol=1e-5)


def test_a_layer_that_is_given_no_token_adds_nothing():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8))
    assert filled(model, target_modules=["1"])(torch.zeros(0, 4)).shape == (0, 8)


def test_all_linear_of_a_model_without_sequences_is_refused():
    model = t.ResNetForImageClassification(t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]))
    with pytest.raises(ValueError, match=r"finds nothing to adapt in ResNetForImageClassification.*such as LoRA"):
        get_peft_model(model, READConfig(target_modules="all-linear"))


def test_projections_that_project_positions_too_are_left_out_of_all_linear():
    settings = {**BLOCKS, "vocab_size": 60, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
    for shared in (False, True):
        model = t.DebertaV2Model(t.DebertaV2Config(**settings, share_att_key=shared, position_buckets=4))
        adapted = get_peft_model(model, READConfig(target_modules="all-linear"))
        layers = [name for name, module in adapted.named_modules() if hasattr(module, "readapter_up")]
        names = {name.rpartition(".")[2] for name in layers}
        assert ("query_proj" in names, "value_proj" in names) == (not shared, True)
        adapted(torch.randint(1, 60, (2, 7)))


def test_a_stack_without_embeddings_runs_with_an_empty_cache():
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "dim_ff": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "dim_head": 8}
    model = t.CpmAntForCausalLM(t.CpmAntConfig(vocab_size=60, prompt_length=2, prompt_types=4, **settings)).eval()
    adapted, ids = filled(model), torch.randint(1, 30, (2, 7))
    with torch.no_grad():
        cached, uncached = adapted(ids), adapted(ids, use_cache=False)
    assert torch.allclose(cached.logits, uncached.logits, atol=1e-4)  # of 18: the bare model is no closer
    with pytest.raises(NotImplementedError, match="use_cache=False"):
        adapted.generate(input_ids=ids, max_new_tokens=3)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, query, key, attention_mask=None):
        return self.query(query), self.key(key)


class CrossAttending(nn.Module):
    """A block whose cross-attention is told the padding of the text by a mask over all pairs."""

    def __init__(self):
        super().__init__()
        self.attention = Attending()

    def forward(self, vision_feats, prompt_feats, prompt_cross_attn_mask=None):
        return self.attention(vision_feats, prompt_feats, attention_mask=prompt_cross_attn_mask)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([CrossAttending()])

    def forward(self, image, text, mask=None):
        return self.layers[0](image, text, prompt_cross_attn_mask=mask)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("pixels", [3, 5, 9])
def test_padding_of_what_cross_attention_reads_is_known_from_a_mask_over_pairs(additive, pixels):
    torch.manual_seed(0)
    adapted = filled(Stack(), target_modules=["query", "key"])
    image, text = torch.randn(2, pixels, 8), torch.randn(2, 5, 8)
    real = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]).bool()
    mask = real[:, None, None].expand(2, 1, pixels, 5)
    if additive:
        mask = torch.where(mask, 0.0, -torch.inf)
    with torch.no_grad():
        queries, keys = adapted(image, text, mask)
        queries_alone, keys_alone = adapted(image[1:], text[1:, 2:])
    assert torch.allclose(queries[1], queries_alone[0], atol=1e-6)
    assert torch.allclose(keys[1, 2:], keys_alone[0], atol=1e-6)
