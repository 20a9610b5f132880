"""The canonical graph becomes the one that TensorRT builds: standard operators of opset 24, and one plugin.

    inputs   input_ids [B, S], query_positions [B, S], key_positions [B, L], write_index [B], logit_rows [R], all int64;
             past_key_values.N.key / .value [B, kv_heads, C, D] of the target's type; external weights by name
    outputs  logits [R, vocab] float32, present.N.key / .value like the past, which an engine updates in place

Tokens are rows, T = B S of them. Residual, norms, RoPE, router and the softmax over experts are float32, and so are the
logits once lm_head's product is made; matrices and attention have the target's type, in the graph itself, since
TensorRT's networks are strongly typed. Slot 0 of the cache is the sink: its key and value are zero, its score is what
the mask adds, the sink's logit of each head, and it brings nothing but its share of the denominator. Masks come from
positions, as everywhere in the dialect. C, the slots of a cache, is fixed, since TensorRT updates no others; attention
reads the first L of them, as many as key_positions name.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

from gptoss_export.engines.tensorrt.emitter import Emitter
from gptoss_export.engines.tensorrt.precision import LOWEST, Precision
from gptoss_export.exporter.errors import GraphError
from gptoss_export.exporter.ops import DOMAIN, functions_of
from gptoss_export.exporter.ops.moe_experts_mxfp4 import PLUGIN_ATTRIBUTES

OPSET = 24
"""The first with TensorScatter."""
IR_VERSION = 12
"""The first that carries opset 24."""

SINK_POSITION = -2
"""What key_positions holds for slot 0."""

EMBEDDING = "model.embed_tokens.weight"


def lower(model: ir.Model, precision: Precision, *, slots: int, external_weights: bool) -> ir.Model:
    """The lowered form of a canonical model, which is changed.

    slots: C. external_weights: whether experts and embedding are inputs. Raises GraphError for operators that are not
    lowered, such as experts in bfloat16.
    """
    return _Lowering(model, precision, slots).run(external_weights)


def is_external(name: str) -> bool:
    """Whether a weight can be an input of the engine: the experts and the embedding, 13 of 20b's 16 GB in float16."""
    return name == EMBEDDING or ".mlp.experts." in name


class _Lowering:
    """Rewrites one model."""

    def __init__(self, model: ir.Model, precision: Precision, slots: int) -> None:
        self._slots = slots
        self._model, self._graph = model, model.graph
        self._type = ir.DataType[precision.onnx_type]
        self._lowest = LOWEST[precision]
        self._put = Emitter(self._graph, self._type)
        self._emit, self._constant, self._once = self._put.emit, self._put.constant, self._put.once

    def run(self, external_weights: bool) -> ir.Model:

        i64 = ir.DataType.INT64
        self._forget_shapes()
        self._query = ir.val("query_positions", i64, ("batch_size", "sequence_length"))
        self._key = ir.val("key_positions", i64, ("batch_size", "read_slots"))
        self._write = ir.val("write_index", i64, ("batch_size",))
        self._rows = ir.val("logit_rows", i64, ("logit_count",))
        self._positions_become_inputs()
        handlers = {
            (DOMAIN, "Linear"): self._linear,
            (DOMAIN, "LinearNoBias"): self._head,
            (DOMAIN, "MoERouter"): self._router,
            (DOMAIN, "MoEExperts"): self._experts,
            (DOMAIN, "SinkAttention"): self._attention,
            ("", "RotaryEmbedding"): self._rotary,
        }
        for node in list(self._graph):
            self._put.at = node
            if handler := handlers.get((node.domain, node.op_type)):
                handler(node)
            elif node.domain == DOMAIN:
                raise GraphError(
                    f"{node.op_type} has no form for TensorRT",
                    "Export a checkpoint with MXFP4 experts, or use --target onnx.",
                )
            elif node.name == "kept_hidden":
                self._put.replace(node, self._emit("Gather", [node.inputs[0], self._rows], "read_rows", {"axis": 0}))
        self._rows_of_tokens()
        inputs = [value for value in self._graph.inputs if value.name and not value.name.startswith("num_logits")]
        inputs = [value for value in inputs if value.name != "attention_mask"]
        RemoveUnusedNodesPass()(self._model)
        self._graph.inputs[:] = [inputs[0], self._query, self._key, self._write, self._rows, *inputs[1:]]
        self._graph.initializers.pop("num_logits_to_keep", None)
        self._graph.opset_imports[""] = OPSET
        lowered = ir.Model(
            self._graph,
            ir_version=IR_VERSION,
            producer_name=self._model.producer_name,
            functions=functions_of(self._graph),
        )
        for function in lowered.functions.values():
            function.opset_imports[""] = OPSET
        RemoveUnusedOpsetsPass()(lowered)
        if external_weights:
            self._weights_become_inputs()
        return lowered

    def _forget_shapes(self) -> None:
        """Tokens become rows, so no shape that was inferred before holds."""
        for node in self._graph:
            for value in node.outputs:
                if not value.is_graph_output():
                    value.shape = None

    def _positions_become_inputs(self) -> None:
        for node in self._graph:
            if node.domain == DOMAIN and node.op_type == "SinkAttention":
                self._head_dim = _fixed(node.inputs[3], 3)
                olds = node.inputs[6:8]
                news = (self._query, self._key)
                ir.convenience.replace_all_uses_with([v for v in olds if v is not None], news)
                return
        raise GraphError("the graph has no attention", "Report this with config.json.")

    def _rows_of_tokens(self) -> None:
        """[B, S, H] -> [T, H] right behind the embedding."""
        gather = next(node for node in self._graph if node.inputs and node.inputs[0] is not None
                      and node.inputs[0].name == EMBEDDING)  # fmt: skip
        (cast,) = gather.outputs[0].consumers()
        uses = list(cast.outputs[0].uses())
        order = {node: i for i, node in enumerate(self._graph)}
        self._put.at = min((use.node for use in uses), key=lambda node: order[node])
        rows = self._emit(
            "Reshape",
            [cast.outputs[0], self._constant("row_shape", [-1, _fixed(gather.inputs[0], 1)])],
            "embed.rows",
        )
        for use in uses:
            use.node.replace_input_with(use.idx, rows)

    def _weights_become_inputs(self) -> None:
        for name in [name for name in self._graph.initializers if is_external(name)]:
            self._graph.inputs.append(self._graph.initializers.pop(name))

    def _linear(self, node: ir.Node) -> None:
        x, weight, bias = node.inputs
        assert weight is not None and bias is not None
        for value in (weight, bias):
            _retype(value, self._type)
        y = self._emit("Gemm", [self._put.narrow(x), weight, bias], f"{node.name}.gemm", {"transB": 1}, self._type)
        # The output of o_proj joins the residual; q, k and v go on in the target's type.
        wide = any(use.op_type == "Add" for use in node.outputs[0].consumers())
        self._put.replace(node, self._put.wide(y, f"{node.name}.float") if wide else y)

    def _head(self, node: ir.Node) -> None:
        x, weight = node.inputs
        assert weight is not None
        _retype(weight, self._type)
        y = self._emit("Gemm", [self._put.narrow(x), weight], f"{node.name}.gemm", {"transB": 1}, self._type)
        logits = self._put.wide(y, "logits")
        logits.name = "logits"
        assert weight.shape is not None
        self._put.replace(node, logits)
        logits.shape = ir.Shape(["logit_count", weight.shape[0]])

    def _rotary(self, node: ir.Node) -> None:
        """In float32, from rows to heads: [T, heads D] -> [B, heads, S, D]."""
        x, cos, sin = node.inputs
        heads = node.attributes["num_heads"].as_int()
        x4 = self._heads_first(self._put.wide(x, f"{node.name}.float"), heads, f"{node.name}.heads")
        y = self._emit("RotaryEmbedding", [x4, cos, sin], f"{node.name}.rotated", dtype=ir.DataType.FLOAT)
        self._put.replace(node, self._put.narrow(y))

    def _attention(self, node: ir.Node) -> None:
        q, k, v, past_key, past_value, sinks, _, _ = node.inputs
        heads, kv = (node.attributes[name].as_int() for name in ("num_heads", "kv_heads"))
        window, scale = node.attributes["window"].as_int(), node.attributes["scale"].as_float()
        v4 = self._heads_first(v, kv, f"{node.name}.v_heads")
        caches, read, bounds = [], [], self._read_bounds()
        for past, new, present in ((past_key, k, node.outputs[1]), (past_value, v4, node.outputs[2])):
            assert past is not None
            cache = self._emit(
                "TensorScatter", [past, new, self._write], f"{present.name}.update", {"axis": 2}, self._type
            )
            for value in (past, cache):
                _retype(value, self._type)
                value.shape = self._cache_shape(past)
            caches.append(cache)
            read.append(self._emit("Slice", [cache, *bounds], f"{present.name}.read", dtype=self._type))
        mask = self._mask(sinks, window, heads, node.name)
        attributes = {"scale": scale}
        y = self._emit("Attention", [q, *read, mask], f"{node.name}.attention", attributes, self._type)
        last = self._emit("Transpose", [y], f"{node.name}.heads_last", {"perm": [0, 2, 1, 3]}, self._type)
        rows = self._constant(f"{node.name}.row_shape", [-1, heads * self._head_dim])
        out = self._emit("Reshape", [last, rows], f"{node.name}.rows", dtype=self._type)
        self._put.replace(node, out, *caches)

    def _cache_shape(self, past: ir.Value) -> ir.Shape:
        assert past.shape is not None
        batch, heads, _, dim = past.shape
        return ir.Shape([batch, heads, self._slots, dim])

    def _read_bounds(self) -> list[ir.Value]:
        """Start, end and axis of the slots that attention reads."""
        end = self._once("read_slots", lambda: self._emit("Shape", [self._key], "read_slots", {"start": 1, "end": 2}))
        return [self._constant("slot_0", [0]), end, self._constant("slot_axis", [2])]

    def _mask(self, sinks: ir.Value | None, window: int, heads: int, name: str | None) -> ir.Value:
        """[B, heads, S, C] of the target's type: the sink's logit in its slot, 0 for what is seen, lowest elsewhere."""
        bias = self._once(f"window_{window}_bias" if window else "full_bias", lambda: self._bias(window))
        is_sink = self._once("sink_slots", self._sink_slots)
        logits = self._put.cast(sinks, self._type, f"{name}.sinks_cast")
        shaped = self._emit(
            "Reshape",
            [logits, self._constant("per_head", [1, heads, 1, 1])],
            f"{name}.sink_logits",
            dtype=self._type,
        )
        return self._emit("Where", [is_sink, shaped, bias], f"{name}.mask", dtype=self._type)

    def _sink_slots(self) -> ir.Value:
        sink = self._constant("sink_position", SINK_POSITION)
        here = self._emit("Equal", [self._key, sink], "sink_slots_2d")
        return self._emit("Unsqueeze", [here, self._constant("axes_1_2", [1, 2])], "sink_slots")

    def _bias(self, window: int) -> ir.Value:
        """[B, 1, S, C], see `exporter.ops.sink_attention.position_bias`."""
        name = f"window_{window}" if window else "full"
        q = self._once("queries", lambda: self._emit(
            "Unsqueeze", [self._query, self._constant("axes_1_3", [1, 3])], "queries"))  # fmt: skip
        k = self._once("keys", lambda: self._emit(
            "Unsqueeze", [self._key, self._constant("axes_1_2", [1, 2])], "keys"))  # fmt: skip
        seen = self._once("seen", lambda: self._emit("And", [
            self._emit("GreaterOrEqual", [k, self._constant("position_0", 0)], "real"),
            self._emit("LessOrEqual", [k, q], "not_later")], "seen"))  # fmt: skip
        if window:
            near = self._emit(
                "Less",
                [self._emit("Sub", [q, k], f"{name}.distance"), self._constant(name, window)],
                f"{name}.near",
            )
            seen = self._emit("And", [seen, near], f"{name}.seen")
        visible, masked = (
            self._constant(label, value, self._type) for label, value in (("visible", 0.0), ("masked", self._lowest))
        )
        return self._emit("Where", [seen, visible, masked], f"{name}_bias", dtype=self._type)

    def _router(self, node: ir.Node) -> None:
        x, weight, bias = node.inputs
        w, b = (
            self._put.cast(v, ir.DataType.FLOAT, f"{node.name}.{part}_float")
            for v, part in ((weight, "w"), (bias, "b"))
        )
        logits = self._emit("Gemm", [x, w, b], f"{node.name}.logits", {"transB": 1}, ir.DataType.FLOAT)
        k = self._constant(f"{node.name}.top_k", [node.attributes["top_k"].as_int()])
        values, experts = self._put.emit_many("TopK", [logits, k], f"{node.name}.top", 2)
        weights = self._emit("Softmax", [values], f"{node.name}.weights", {"axis": -1}, ir.DataType.FLOAT)
        self._put.replace(node, weights, self._put.cast(experts, ir.DataType.INT32, f"{node.name}.experts"))

    def _experts(self, node: ir.Node) -> None:
        x, weights, experts, *stored = node.inputs
        for value in stored:
            assert value is not None
            if value.dtype == ir.DataType.UINT8:
                _retype(value, ir.DataType.INT8)
        y = self._emit(
            "MoEExpertsMXFP4",
            [self._put.narrow(x), weights, experts, *stored],
            f"{node.name}.sum",
            {name: attribute.value for name, attribute in node.attributes.items()} | PLUGIN_ATTRIBUTES,
            ir.DataType.FLOAT,
            domain=DOMAIN,
        )
        self._put.replace(node, y)

    def _heads_first(self, x: ir.Value | None, heads: int, name: str) -> ir.Value:
        """[T, heads D] -> [B, heads, S, D]."""
        tokens = self._once("token_dims", lambda: self._emit("Shape", [self._query], "token_dims"))
        # Written out: TensorRT wants the size of a head while it parses.
        count = self._constant(f"heads_{heads}", [heads, self._head_dim])
        split = self._once(
            f"split_{heads}", lambda: self._emit("Concat", [tokens, count], f"split_{heads}", {"axis": 0})
        )
        assert x is not None
        last = self._emit("Reshape", [x, split], f"{name}.last", dtype=x.dtype)
        return self._emit("Transpose", [last], name, {"perm": [0, 2, 1, 3]}, x.dtype)


def _retype(value: ir.Value, dtype: ir.DataType) -> None:
    """Another type for a value that was cloned, whose type object is still that of the original."""
    value.type = ir.TensorType(dtype)


def _fixed(value: ir.Value | None, axis: int) -> int:
    """A dimension that the config fixes."""
    assert value is not None and value.shape is not None
    size = value.shape[axis]
    assert isinstance(size, int)
    return size
