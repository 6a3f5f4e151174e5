"""READ under torch.compile, FSDP, offloading and quantised caches."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from tiny_models import adapted, build, padded_batch, read_layers
from torch import nn
from transformers import AutoModelForCausalLM

from peft_read import READConfig
from peft_read.adapter import sequence_scope
from peft_read.adapter.running import current_scope
from peft_read.checkpointing import ScopedCheckpoint, scope_checkpoints, unscope_checkpoints

TOLERANCE = 1e-5


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield lambda model, **settings: torch.compile(model, **{"backend": "eager", **settings})
    torch._dynamo.reset()


@pytest.mark.parametrize(("family", "cell"), [("bert", "rnn"), ("bart", "lstm"), ("t5", "gru")])
def test_an_encoder_compiles_to_one_graph(compiler, family, cell):
    model = adapted(family, cell=cell)
    encoder = model if family == "bert" else model.get_base_model().get_encoder()
    ids, mask = padded_batch(family)
    compiled = compiler(encoder, fullgraph=True)
    with torch.no_grad():
        for inputs in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": ids}):
            expected = encoder(**inputs).last_hidden_state
            torch.testing.assert_close(compiled(**inputs).last_hidden_state, expected, rtol=0, atol=TOLERANCE)


def test_a_decoder_without_a_cache_compiles_to_one_graph_and_trains(compiler):
    model = adapted("llama", changes={"num_hidden_layers": 1})
    ids, mask = padded_batch("llama")
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids, "use_cache": False}
    gradients = []
    for forward in (model, compiler(model, fullgraph=True)):
        model.zero_grad()
        forward(**inputs).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_a_compiled_decoder_with_a_cache_breaks_its_graph_and_is_right(compiler):
    stack = adapted("llama", changes={"num_hidden_layers": 1}).get_base_model().model
    ids, _ = padded_batch("llama", pads=(0, 0))
    with torch.no_grad():
        whole = stack(input_ids=ids).last_hidden_state
        compiled = compiler(stack)
        first = compiled(input_ids=ids[:, :5], use_cache=True)
        second = compiled(input_ids=ids[:, 5:], past_key_values=first.past_key_values)
        pieces = torch.cat((first.last_hidden_state, second.last_hidden_state), dim=1)
        torch.testing.assert_close(pieces, whole, rtol=0, atol=TOLERANCE)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="__class__"):
            compiler(stack, fullgraph=True)(input_ids=ids, use_cache=True)
        torch.testing.assert_close(stack(input_ids=ids).last_hidden_state, whole)
    assert current_scope() is None  # what the aborted compilation left behind is gone


def test_a_scope_around_a_compiled_model_is_seen(compiler):
    blocks = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))
    model = get_peft_model(blocks, READConfig(target_modules=["2"], init_weights=False)).eval()
    x, mask = torch.randn(2, 5, 6), torch.tensor([[0, 1, 1, 1, 1], [1, 1, 0, 1, 1]])
    whole, in_pieces = compiler(model, fullgraph=True), compiler(model)
    with torch.no_grad():
        plain = model(x)
        with sequence_scope(mask=mask):
            masked = model(x)
        assert not torch.allclose(plain, masked)
        torch.testing.assert_close(whole(x), plain)
        with sequence_scope(mask=mask), pytest.raises(torch._dynamo.exc.Unsupported):
            whole(x)  # rather than one graph without the mask
        for _ in range(2):  # the graph of the one is not used for the other
            torch.testing.assert_close(whole(x), plain)
            with sequence_scope(mask=mask):
                torch.testing.assert_close(in_pieces(x), masked)


def test_a_compiled_stack_keeps_packed_rows_apart(compiler):
    model = adapted("llama", changes={"num_hidden_layers": 1})
    ids, _ = padded_batch("llama", pads=(0, 0))
    straight, restarting = torch.arange(8)[None], torch.arange(4).repeat(2)[None]
    compiled = compiler(model)
    with torch.no_grad():
        for positions in (straight, restarting, straight):
            inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, rtol=0, atol=TOLERANCE)


def test_a_graph_refuses_a_mask_that_keeps_sequences_apart(compiler):
    stack = adapted("llama", changes={"num_hidden_layers": 1}).get_base_model().model
    ids, _ = padded_batch("llama", pads=(0, 0))
    causal = torch.ones(8, 8).tril().bool()[None, None]
    halves = torch.arange(8) // 4
    packed = causal & (halves[:, None] == halves)
    compiled = compiler(stack, fullgraph=True)
    inputs = {"input_ids": ids, "use_cache": False}
    with torch.no_grad():
        expected = stack(**inputs, attention_mask=causal).last_hidden_state
        torch.testing.assert_close(compiled(**inputs, attention_mask=causal).last_hidden_state, expected)
        with pytest.raises(RuntimeError, match=r"keeps several sequences of a row apart.*sequence_scope"):
            compiled(**inputs, attention_mask=packed)
        expected = stack(**inputs, attention_mask=packed).last_hidden_state
        with sequence_scope(segment_ids=halves.expand(2, 8)):  # the way out that it names
            told = compiler(stack)(**inputs, attention_mask=packed).last_hidden_state
        torch.testing.assert_close(told, expected, rtol=0, atol=TOLERANCE)


def test_a_graph_without_a_recurrence_takes_every_mask(compiler):
    stack = adapted("llama", cell="none", changes={"num_hidden_layers": 1}).get_base_model().model
    ids, _ = padded_batch("llama", pads=(0, 0))
    halves = torch.arange(8) // 4
    packed = (torch.ones(8, 8).tril().bool() & (halves[:, None] == halves))[None, None]
    inputs = {"input_ids": ids, "attention_mask": packed, "use_cache": False}
    with torch.no_grad():
        found = compiler(stack, fullgraph=True)(**inputs).last_hidden_state
        torch.testing.assert_close(found, stack(**inputs).last_hidden_state, rtol=0, atol=TOLERANCE)


@pytest.fixture
def regional(compiler):
    """A function that compiles the blocks of a stack, each by itself."""

    def compile_blocks(model):
        for block in model.get_base_model().model.layers:
            block.compile(backend="eager")

    return compile_blocks


def test_compiled_blocks_of_an_uncompiled_stack_see_its_sequences(regional):
    model = adapted("llama", cell="gru")
    ids, mask = padded_batch("llama")
    positions = torch.arange(4).repeat(2)[None].expand(3, -1)
    halves = (torch.arange(8) // 4).expand(3, 8)

    def outputs():
        padded = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        with sequence_scope(segment_ids=halves):
            told = model(input_ids=ids, use_cache=False).logits
        settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True}
        generated = model.generate(
            input_ids=ids, attention_mask=mask, return_dict_in_generate=True, pad_token_id=0, **settings
        )
        return [padded, packed, told, torch.stack(generated.logits)]

    with torch.no_grad():
        expected = outputs()
        regional(model)
        for found, right in zip(outputs(), expected, strict=True):
            torch.testing.assert_close(found, right, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_blocks_of_an_uncompiled_stack_train(regional, checkpointed):
    model = adapted("llama").train()
    model.enable_input_require_grads()
    ids, _ = padded_batch("llama", pads=(0, 0))
    packed = {"input_ids": ids, "position_ids": torch.arange(4).repeat(2)[None], "labels": ids}
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    gradients = []
    for compiled in (False, True):
        if compiled:
            regional(model)
        model.zero_grad()
        model(**packed, use_cache=False).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0] and gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_a_mixed_batch_leaves_the_graph_and_is_right(compiler):
    model = adapted("llama", changes={"num_hidden_layers": 1})
    ids, _ = padded_batch("llama", pads=(0, 0))
    block = model.get_base_model().model.layers[0]
    inputs = {"input_ids": ids, "use_cache": False}
    with torch.no_grad():
        names = ["default", "__base__"]
        expected, mixed = model(**inputs).logits, model(**inputs, adapter_names=names).logits
        assert not torch.allclose(mixed[1], expected[1])
        block.mlp = compiler(block.mlp)
        for _ in range(2):  # the graph of the one is not used for the other
            torch.testing.assert_close(model(**inputs).logits, expected)
            torch.testing.assert_close(model(**inputs, adapter_names=names).logits, mixed)


@pytest.fixture
def process_group(tmp_path):
    """A world of one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def one_step(model, parameters, ids, mask):
    """Loss, then the loss after one step."""
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_fsdp_of_the_first_generation(process_group, use_orig_params):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = adapted("llama")
    ids, mask = padded_batch("llama")
    plain = copy.deepcopy(model)
    expected = one_step(plain, [p for p in plain.parameters() if p.requires_grad], ids, mask)
    assert expected[1] < expected[0]
    sharded = FullyShardedDataParallel(
        model,
        auto_wrap_policy=fsdp_auto_wrap_policy(model),
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
    )
    parameters = [p for p in sharded.parameters() if p.requires_grad]
    assert one_step(sharded, parameters, ids, mask) == pytest.approx(expected, abs=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_fsdp_of_the_second_generation(process_group):
    from torch.distributed.fsdp import fully_shard

    model = adapted("bart")
    ids, mask = padded_batch("bart")
    plain = copy.deepcopy(model)
    expected = one_step(plain, [p for p in plain.parameters() if p.requires_grad], ids, mask)
    assert expected[1] < expected[0]
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    inner = model.get_base_model().model
    for block in [*inner.encoder.layers, *inner.decoder.layers]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert one_step(model, parameters, ids, mask) == pytest.approx(expected, abs=1e-5)
    with torch.no_grad():
        result = model.eval()(input_ids=ids, attention_mask=mask, decoder_input_ids=ids).logits
        reference = plain.eval()(input_ids=ids, attention_mask=mask, decoder_input_ids=ids).logits
    torch.testing.assert_close(result, reference, rtol=0, atol=TOLERANCE)


def test_functional_call_uses_the_weights_it_is_given():
    model = adapted("bert")
    ids, mask = padded_batch("bert")
    swapped = {name: p * 2 for name, p in model.named_parameters() if "readapter_" in name}
    with torch.no_grad():
        result = torch.func.functional_call(model, swapped, (), {"input_ids": ids, "attention_mask": mask})
        for name, parameter in model.named_parameters():
            if name in swapped:
                parameter.mul_(2)
        expected = model(input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(result.last_hidden_state, expected.last_hidden_state)


def test_base_layers_offloaded_to_disk(tmp_path, monkeypatch):
    """Loading an adapter renames the entries of an offload folder, by the layout of the adapter's parts."""
    monkeypatch.chdir(tmp_path)  # peft drops the first slash of the offload folder, and so makes a second one here
    donor = adapted("llama")
    donor.save_pretrained(tmp_path / "adapter")
    build("llama").save_pretrained(tmp_path / "base")
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    device_map |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert next(base.model.layers[1].parameters()).device.type == "meta"
    device_map = {f"base_model.model.{name}": device for name, device in device_map.items()}
    model = PeftModel.from_pretrained(
        base, tmp_path / "adapter", device_map=device_map, offload_dir=str(tmp_path / "offload")
    ).eval()
    ids, mask = padded_batch("llama")
    with torch.no_grad():
        expected = donor(input_ids=ids, attention_mask=mask).logits
        result = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(result, expected, rtol=0, atol=TOLERANCE)


def test_data_parallel_replicas_share_nothing():
    """Replicas run in threads; on a machine without GPUs the module calls its only copy."""
    model = adapted("bert")
    ids, mask = padded_batch("bert")
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
        result = nn.DataParallel(model)(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(result, expected)


def test_no_tokens_and_no_rows_are_no_error():
    layer = read_layers(adapted("llama"))[0]
    with torch.no_grad():
        for shape in ((2, 0, 32), (0, 3, 32), (0, 32)):
            assert layer(torch.zeros(shape)).shape == (*shape[:-1], 16)


def test_checkpoints_are_found_beside_traced_modules():
    model = nn.Module()
    model.traced = torch.jit.trace(nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2))
    model.layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])
    model.layers[0].checkpoint_fn = print
    scope_checkpoints(model, lambda: None, "test")
    assert isinstance(vars(model.layers[0])["checkpoint_fn"], ScopedCheckpoint)
    unscope_checkpoints(model, "test")
    assert vars(model.layers[0])["checkpoint_fn"] is print
