"""What the network is: its sizes and switches, checked in one place.

Knows nothing of how the network is trained or decoded. Next: `decoder.py`, which builds it.
"""

from dataclasses import dataclass
from typing import Any, Literal

from layerskip_moe.refusals import require_number, require_whole, shown

# Past every network there is, and such that no product of a weight's sizes is past 64 bits; what a damaged file says is
# refused here, before it is built layer by layer.
MOST_LAYERS, _LARGEST_SIZE, _MOST_IDS = 2**14, 2**19, 2**31 - 1


@dataclass(frozen=True)
class RopeScaling:
    """How rotary positions are stretched beyond the length that a model was first trained at.

    Attributes:
        kind: "linear": all pairs slowed by factor; "llama3" (Llama 3.1) and "yarn" (arXiv 2309.00071): only those
            that turn seldom within the trained length
        factor: how much longer texts may get
        original_max_seq_len: the length of first training; needed by llama3 and yarn
        low_freq_factor: llama3: pairs that turn less often than this within that length are slowed whole
        high_freq_factor: llama3: those that turn more often than this stay
        beta_fast: yarn: pairs that turn more often than this within that length stay
        beta_slow: yarn: those that turn less often than this are slowed whole
        attention_factor: yarn: what queries and keys are scaled by (default: 0.1 ln(factor) + 1)
        truncate: yarn: round the ends of the ramp between the two outwards to whole pairs
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_seq_len: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3", "yarn"):
            raise ValueError(f"rope_scaling's kind={shown(self.kind)} is unknown; it is 'linear', 'llama3' or 'yarn'.")
        names = ["factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"]
        if self.attention_factor is not None:
            names.append("attention_factor")
        for name in names:
            require_number(f"rope_scaling's {name}", getattr(self, name))
            if not getattr(self, name) > 0:
                raise ValueError(f"rope_scaling's {name}={getattr(self, name)} must be above 0.")
        if self.kind != "linear":
            require_whole("rope_scaling's original_max_seq_len", self.original_max_seq_len, at_least=1)
        if not isinstance(self.truncate, bool):
            raise ValueError(f"rope_scaling's truncate={shown(self.truncate)} must be True or False.")
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"rope_scaling's low_freq_factor={self.low_freq_factor} must be below "
                f"high_freq_factor={self.high_freq_factor}."
            )

    @property
    def trained_length(self) -> int:
        """The length of first training, for the kinds that need one."""
        assert self.original_max_seq_len is not None
        return self.original_max_seq_len


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a decoder. The defaults are Qwen3-MoE's arithmetic, the native network.

    Fields left at None follow from the others and are filled in at construction, so that reading
    `config.head_dim` always gives a number. Raises ValueError, naming the field, for sizes that do not fit
    together.

    Attributes:
        vocab_size: V, rows of the embedding and of the head
        n_layers: L, layers
        d_model: D, width of the residual stream
        n_heads: H, query heads
        n_kv_heads: G, key-value heads; H is a multiple of it (default: n_heads)
        head_dim: width of one head, even (default: d_model / n_heads)

        d_ff: F, hidden width of each expert, and of dense layers unless dense_d_ff is set (default: 2 * d_model)
        dense_d_ff: hidden width of layers without experts (default: d_ff)
        num_experts: E; 0 gives a dense network
        top_k: K, experts chosen per token
        moe_layers: which layers hold experts: "all", "every other" (layers 1, 3, 5, ..., as Qwen3-MoE's
            decoder_sparse_step=2 has it), "first half" or "last half" (as many as every other, the first or last
            ones; kept as their indices), or the layers' indices
        shared_expert_d_ff: hidden width of an expert that every token passes through; 0: none
        shared_expert_gate: scale the shared expert by a sigmoid gate, as Qwen2-MoE does
        normalize_top_k: divide the chosen weights by their sum (Mixtral, Qwen3-MoE yes; OLMoE no)
        bias_balancing: keep a bias per expert that steers the choice but not the weights (DeepSeek-V3)
        router_average: a, 0 or more and below 1: experts are chosen by the mean of the router's logits over the last
            8 positions of the text, the j-th one back weighing a^j (`router_memory.py`); 0: by a position's own
        router_hold: h, 1 or more: every h positions in a row are routed by the logits, or their mean, of the first of
            them; 1: each by its own

        qk_norm: RMSNorm of queries and keys: per "head" (Qwen3), over the "full" width (OLMoE), or None
        qkv_bias: biases on the query, key and value projections (Qwen2)
        output_bias: a bias on attention's output projection
        mlp_bias: biases on the three projections of every layer's MLP, in a network without experts
        clip_qkv: projected queries, keys and values are clamped to this size, after a "full" norm (OLMoE); None: not
        sliding_window: a position reads only the last so many, itself among them (Mistral); None: all before it
        sliding_layers: which layers have that window: "all", or the layers' indices
        tie_embeddings: the head is the embedding
        rope_theta: base of the rotary frequencies
        rope_scaling: how these are stretched to longer texts, a RopeScaling or a dict of its fields; None: not
        norm_eps: epsilon of every RMSNorm
        max_seq_len: positions the model may be run at; more are refused

        dropout: probability of zeroing elements of each sublayer's output, in training mode only
        init_std: standard deviation of the initial weights (default: 1 / sqrt(d_model), which keeps a normed
            state's projections at unit size at any width; at width 192 the usual 0.02 was behind 0.06 after 100
            steps, one seed); the projections that write into the residual stream get init_std / sqrt(2 L) (GPT-2)
    """

    vocab_size: int
    n_layers: int = 8
    d_model: int = 256
    n_heads: int = 4
    n_kv_heads: int | None = None
    head_dim: int | None = None
    d_ff: int | None = None
    dense_d_ff: int | None = None
    num_experts: int = 8
    top_k: int = 2
    moe_layers: Literal["all", "every other", "first half", "last half"] | tuple[int, ...] = "all"
    shared_expert_d_ff: int = 0
    shared_expert_gate: bool = False
    normalize_top_k: bool = True
    bias_balancing: bool = False
    router_average: float = 0.0
    router_hold: int = 1
    qk_norm: Literal["head", "full"] | None = "head"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    clip_qkv: float | None = None
    sliding_window: int | None = None
    sliding_layers: Literal["all"] | tuple[int, ...] = "all"
    tie_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    max_seq_len: int = 1024
    dropout: float = 0.0
    init_std: float | None = None

    def __post_init__(self) -> None:
        require_whole("n_layers", self.n_layers, 1, MOST_LAYERS)
        for name in ("vocab_size", "max_seq_len"):
            require_whole(name, getattr(self, name), 1, _MOST_IDS)
        for name in ("d_model", "n_heads"):
            require_whole(name, getattr(self, name), 1, _LARGEST_SIZE)
        for name in ("n_kv_heads", "head_dim", "d_ff", "dense_d_ff"):
            if getattr(self, name) is not None:
                require_whole(name, getattr(self, name), 1, _LARGEST_SIZE)
        if self.sliding_window is not None:
            require_whole("sliding_window", self.sliding_window, 1)
        for name in ("num_experts", "shared_expert_d_ff"):
            require_whole(name, getattr(self, name), 0, _LARGEST_SIZE)
        switches = ("shared_expert_gate", "normalize_top_k", "bias_balancing", "qkv_bias", "output_bias", "mlp_bias")
        for name in (*switches, "tie_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={shown(getattr(self, name))} must be True or False.")
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ValueError(
                f"d_model={self.d_model} is not a multiple of n_heads={self.n_heads}; "
                "change one of them or give head_dim."
            )
        self._fill("n_kv_heads", self.n_heads)
        self._fill("head_dim", self.d_model // self.n_heads)
        self._fill("d_ff", 2 * self.d_model)
        self._fill("dense_d_ff", self.d_ff)
        self._fill("init_std", self.d_model**-0.5)
        self._name_half()
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}, "
                "so the query heads cannot be shared out evenly."
            )
        if self.head_width % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary positions rotate pairs, so it must be even.")
        for name in ("moe_layers", "sliding_layers"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if not isinstance(self.rope_scaling, RopeScaling | None):  # a dict, as JSON has it
            object.__setattr__(self, "rope_scaling", _rope_scaling(self.rope_scaling))
        self._check_experts()
        self._check_window()
        if self.qk_norm not in ("head", "full", None):
            raise ValueError(f"qk_norm={shown(self.qk_norm)} is unknown; it is 'head', 'full' or None.")
        positive = ["rope_theta", "norm_eps", "init_std"] + (["clip_qkv"] if self.clip_qkv is not None else [])
        for name in ("dropout", *positive):
            require_number(name, getattr(self, name))
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} must be a probability, 0 or more and below 1.")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0.")
        if self.rope_scaling is not None and self.rope_scaling.kind == "yarn" and not self.rope_theta > 1:
            raise ValueError(f"rope_theta={self.rope_theta} must be above 1 for yarn, whose ramp is told by it.")

    def _fill(self, name: str, value: float | None) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    def _name_half(self) -> None:
        """Name the layers of a half by their indices, as every layout does that has no word for it."""
        layers, half = range(self.n_layers), self.n_layers // 2
        if self.moe_layers == "first half":
            object.__setattr__(self, "moe_layers", tuple(layers[:half]))
        elif self.moe_layers == "last half":
            object.__setattr__(self, "moe_layers", tuple(layers[self.n_layers - half :]))

    def _check_layers(self, name: str) -> None:
        outside = [i for i in getattr(self, name) if type(i) is not int or not 0 <= i < self.n_layers]
        if outside:
            raise ValueError(f"{name} names {shown(outside)}, but layers are 0 to {self.n_layers - 1}.")

    def _check_window(self) -> None:
        if isinstance(self.sliding_layers, tuple):
            self._check_layers("sliding_layers")
            if self.sliding_window is None:
                raise ValueError("sliding_layers need a window: set sliding_window.")
        elif self.sliding_layers != "all":
            raise ValueError(
                f"sliding_layers={shown(self.sliding_layers)} is unknown; it is 'all' or a list of indices."
            )

    def _check_experts(self) -> None:
        if self.mlp_bias and self.num_experts:
            raise ValueError("mlp_bias is for networks without experts: set num_experts=0, or leave it out.")
        if isinstance(self.moe_layers, tuple):
            self._check_layers("moe_layers")
        elif self.moe_layers not in ("all", "every other"):
            raise ValueError(
                f"moe_layers={shown(self.moe_layers)} is unknown; it is 'all', 'every other', 'first half', "
                "'last half' or a list of layer indices."
            )
        require_number("router_average", self.router_average)
        if not 0.0 <= self.router_average < 1.0:
            raise ValueError(f"router_average={self.router_average} must be 0 or more and below 1; 0 is no average.")
        require_whole("router_hold", self.router_hold, at_least=1)
        if self.num_experts == 0:
            if self.shared_expert_d_ff or self.shared_expert_gate or self.bias_balancing or self.router_remembers:
                raise ValueError(
                    "shared_expert_d_ff, shared_expert_gate, bias_balancing, router_average and router_hold need "
                    "experts, but num_experts is 0."
                )
            return
        require_whole("top_k", self.top_k, at_least=1)
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k={self.top_k} experts cannot be chosen from num_experts={self.num_experts}; "
                "lower top_k or add experts."
            )
        if self.shared_expert_gate and not self.shared_expert_d_ff:
            raise ValueError("shared_expert_gate needs a shared expert: set shared_expert_d_ff.")

    # The Optional fields are filled in __post_init__; these give them to a type checker as plain numbers.
    @property
    def kv_heads(self) -> int:
        """G, the key-value heads."""
        assert self.n_kv_heads is not None
        return self.n_kv_heads

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        assert self.head_dim is not None
        return self.head_dim

    @property
    def expert_d_ff(self) -> int:
        """F, hidden width of one expert."""
        assert self.d_ff is not None
        return self.d_ff

    @property
    def router_remembers(self) -> bool:
        """Whether experts are chosen by the router's logits of earlier positions too, so that a cache keeps them."""
        return self.router_average > 0 or self.router_hold > 1

    def is_moe(self, layer: int) -> bool:
        """Whether layer (0..L-1) holds experts."""
        if self.num_experts == 0:
            return False
        if isinstance(self.moe_layers, tuple):
            return layer in self.moe_layers
        return self.moe_layers == "all" or layer % 2 == 1

    def is_windowed(self, layer: int) -> bool:
        """Whether positions in layer (0..L-1) read only the last `sliding_window` ones."""
        if self.sliding_window is None:
            return False
        return self.sliding_layers == "all" or layer in self.sliding_layers


def _rope_scaling(fields: Any) -> RopeScaling:
    try:
        return RopeScaling(**fields)
    except TypeError as error:  # no dict, or a field too many or too few
        raise ValueError(
            f"rope_scaling={shown(fields)} does not describe a RopeScaling ({shown(str(error))})."
        ) from None
