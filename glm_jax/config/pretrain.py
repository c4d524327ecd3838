"""Settings of the model and of pre- and mid-training. Defaults are GLM-4.5's where the report gives them."""

from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Literal

from glm_jax.config.functions import SILENT_AT_DEFAULT, ConfigError, check_choices, divides, require

DType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Model:
    """Shapes of a GLM-4.5 model (report, section 2.1). Letters as in `glm_jax.dims`."""

    V: int = 151_552  # entries of the vocabulary
    D: int = 5120  # width of the residual stream
    L: int = 92  # decoder layers, dense ones included, the MTP layer not
    dense_layers: int = 3  # of them without experts, the first ones
    N: int = 96  # query heads
    K: int = 8  # key-value heads, each shared by N / K queries'
    H: int = 128  # width of a head
    F: int = 12_288  # hidden width of a dense layer
    M: int = 1536  # hidden width of an expert
    E: int = 160  # routed experts of a layer
    A: int = 8  # of them those that a token goes to
    shared_experts: int = 1  # that every token goes to
    mtp_layers: int = 1  # multi-token-prediction layers behind the others
    qk_norm: bool = True  # RMSNorm of queries and keys, head by head
    qkv_bias: bool = True  # of the three projections
    rope_fraction: float = 0.5  # of a head's dims that RoPE rotates
    rope_theta: float = 1_000_000.0  # RoPE's base; a stage has its own
    max_positions: int = 131_072  # the longest row
    routed_scale: float = 2.5  # that the routed experts' sum is multiplied by
    norm_eps: float = 1e-5  # added under RMSNorm's root
    init_std: float = 0.02  # of matrices' initial values
    # of activations and matmul inputs; parameters keep theirs, and softmax, norms and router compute in float32
    dtype: DType = "bfloat16"
    balance_on: Literal["unbiased", "biased"] = "unbiased"  # scores whose top-k the sequence balance loss counts
    # what a layer keeps for its backward pass: all of it; what enters it; the same in the host's memory
    remat: Literal["none", "layer", "offload"] = "layer"
    implementation: Literal["reference", "xla"] | None = None  # of the kernels; None: the best that applies
    # how tokens come to experts of other devices: all to all devices, or each to those of its experts; None: the better
    dispatch: Literal["gather", "ragged"] | None = field(default=None, metadata=SILENT_AT_DEFAULT)
    # with mesh.pipeline: parts of a microbatch's rows that follow each other through the stages, for each stage
    microbatches_per_stage: int = field(default=4, metadata=SILENT_AT_DEFAULT)
    # and how often they do: a stage's layers in as many groups, with those of the others between them
    pipeline_rounds: int = field(default=1, metadata=SILENT_AT_DEFAULT)

    def __post_init__(self):
        check_choices(self)
        for name in (*"VDLNKHFMEA", "max_positions", "microbatches_per_stage", "pipeline_rounds"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        for name in ("norm_eps", "rope_theta"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        for name in ("shared_experts", "init_std"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        divides("K", self.K, "N", self.N)
        require(self.A <= self.E, f"A={self.A} active experts of E={self.E}; use at most {self.E}")
        require(0 <= self.dense_layers <= self.L, f"dense_layers={self.dense_layers} must lie in 0..L={self.L}")
        require(self.mtp_layers in (0, 1), f"mtp_layers={self.mtp_layers}: GLM-4.5 has one; use 0 or 1")
        require(
            0 <= self.rotary + self.rotary % 2 <= self.H,
            f"rope_fraction={self.rope_fraction} of H={self.H} rotates more pairs than a head has; use at most 1, or an even H",
        )

    @property
    def G(self) -> int:
        return self.N // self.K

    @property
    def U(self) -> int:
        return 2 * self.D

    @property
    def rotary(self) -> int:
        """Rotated dims of a head, as published: of an odd number the last pairs with one more."""
        return int(self.H * self.rope_fraction)

    @property
    def moe_layers(self) -> int:
        """Decoder layers with routed experts, the MTP layer not counted."""
        return self.L - self.dense_layers

    @property
    def router_rows(self) -> int:
        """Rows of `router_bias_LE`: one per MoE layer, the MTP layer's last."""
        return self.moe_layers + self.mtp_layers

    def size(self, letter: str) -> int:
        """Size of a weight's dimension; X, B, T, S and R belong to data, not to the model."""
        sizes = {name: getattr(self, name) for name in "VDNKHFMEAGU"}
        if letter not in sizes:
            raise ConfigError(f"dimension {letter!r} is not a model size; the model has {''.join(sizes)}")
        return sizes[letter]


@dataclass(frozen=True)
class Optim:
    """Muon for matrices, AdamW for the rest (report, section 2.4; spec section 4)."""

    name: Literal["muon", "adamw"] = "muon"  # adamw: for every parameter, the ablation's other arm
    momentum: float = 0.95  # Muon's
    momentum_dtype: DType = field(default="float32", metadata=SILENT_AT_DEFAULT)  # as it is kept from step to step
    nesterov: bool = True  # a step looks ahead by the momentum
    ns_steps: int = 5  # of Newton-Schulz with the published coefficients
    ns_dtype: DType = "bfloat16"  # that its products take
    ns_polish: int = field(default=0, metadata=SILENT_AT_DEFAULT)  # steps that converge; 2: update_rms holds to 1 %
    ns_gram: bool = field(
        default=False, metadata=SILENT_AT_DEFAULT
    )  # iterate on X X^T alone: faster on GPUs, in float16
    update_rms: float = 0.2  # of a matrix's update, for a learning rate of 1
    lm_head: Literal["muon", "adamw"] = "muon"  # the report excludes only embedding, biases and norms
    router: Literal["muon", "adamw"] = "muon"  # what the routers' matrices are updated by
    split_heads: bool = False  # orthogonalise each head's slice alone (GLM-5's Muon Split)
    weight_decay: float = 0.1  # decoupled, for a learning rate of 1
    decay_norms_and_biases: bool = False  # these too
    adam_b1: float = 0.9  # decay of AdamW's mean
    adam_b2: float = 0.95  # and of its squares
    adam_eps: float = 1e-8  # added to their root
    clip_norm: float = 1.0  # largest norm of all gradients together

    def __post_init__(self):
        check_choices(self)
        for name in ("momentum", "adam_b1", "adam_b2"):
            require(0 <= getattr(self, name) < 1, f"{name}={getattr(self, name)} must lie in [0, 1)")
        for name in ("update_rms", "weight_decay"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative; 0 is none")
        require(self.adam_eps > 0, f"adam_eps={self.adam_eps} must be positive: an unused row's mean and squares are 0")
        require(self.ns_steps >= 1, f"ns_steps={self.ns_steps} must be at least 1")
        require(self.ns_polish >= 0, f"ns_polish={self.ns_polish} must be at least 0; 0 is Muon as published")
        require(
            not (self.ns_gram and self.ns_dtype == "bfloat16"),
            "ns_gram=True loses the small singular values in ns_dtype=bfloat16; set ns_dtype to float16 or float32",
        )
        require(self.clip_norm > 0, f"clip_norm={self.clip_norm} must be positive; use inf for no clipping")


@dataclass(frozen=True)
class Schedule:
    """Learning rate, batch size and loss weights as functions of tokens seen since the start of pre-training.

    One schedule spans pre- and mid-training (report, section 2.4). Token counts are exact Python integers.
    """

    kind: Literal["cosine", "wsd"] = "cosine"  # after the warm-up: half a cosine, or constant and then down
    peak_lr: float = 2.5e-4  # learning rate after the warm-up
    final_lr: float = 2.5e-5  # at the end
    warmup_tokens: int = 33_554_432_000  # 2,000 steps of 16M: our choice, the report is silent
    wsd_decay_fraction: float = 0.1  # last share of the tokens over which WSD decays
    batch_tokens_start: int = 2**24  # of a step, at first
    batch_tokens: int = 2**26  # of a step, after the ramp
    batch_ramp_tokens: int = 500_000_000_000  # over which it grows
    mtp_weight_start: float = 0.3  # of the MTP loss
    mtp_weight: float = 0.1  # after the switch
    mtp_switch_tokens: int = 15_000_000_000_000  # when it switches
    bias_rate: float = 1e-3  # step of the routers' balance bias
    bias_freeze_tokens: int = 15_000_000_000_000  # when the bias stops moving

    def __post_init__(self):
        check_choices(self)
        require(0 <= self.final_lr <= self.peak_lr, f"final_lr={self.final_lr} must lie in 0..peak_lr={self.peak_lr}")
        require(
            0 < self.batch_tokens_start <= self.batch_tokens,
            f"batch_tokens_start={self.batch_tokens_start} must lie in 1..batch_tokens={self.batch_tokens}",
        )
        for name in ("warmup_tokens", "batch_ramp_tokens", "mtp_weight_start", "mtp_weight", "bias_rate"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative; 0 is none")
        for name in ("mtp_switch_tokens", "bias_freeze_tokens"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative; 0 is from the start")
        require(0 < self.wsd_decay_fraction <= 1, f"wsd_decay_fraction={self.wsd_decay_fraction} must lie in (0, 1]")


@dataclass(frozen=True)
class Loss:
    """Weights of what is added to next-token cross-entropy (the MTP weight moves: see `Schedule`)."""

    sequence_balance: float = 1e-4  # of the balance loss within each sequence

    def __post_init__(self):
        require(self.sequence_balance >= 0, f"sequence_balance={self.sequence_balance} must not be negative")


@dataclass(frozen=True)
class Stage:
    """One training stage: how long, on what, in which rows."""

    name: str
    tokens: int
    seq_len: int
    rope_theta: float
    microbatch_rows: int  # rows of one compiled microbatch, over all devices
    mixture: dict[str, float] = field(default_factory=dict)  # domain -> share of the stage's tokens
    packing: Literal["truncate", "best_fit"] = "truncate"
    isolate: bool = False  # attention stays inside a document
    fim_rate: float = 0.5  # share of the readings of code documents (in long-document stages: of files that fit a row)
    long_documents: bool = False  # repositories as one document in dependency order; long documents up-sampled

    def __post_init__(self):
        check_choices(self)
        for name in ("tokens", "rope_theta"):
            require(getattr(self, name) > 0, f"stage {self.name}: {name}={getattr(self, name)} must be positive")
        require(self.seq_len >= 8, f"stage {self.name}: seq_len={self.seq_len} must be at least 8")
        require(
            self.microbatch_rows >= 1, f"stage {self.name}: microbatch_rows={self.microbatch_rows} must be at least 1"
        )
        require(0 <= self.fim_rate <= 1, f"stage {self.name}: fim_rate={self.fim_rate} must lie in 0..1")
        require(
            not self.mixture or (min(self.mixture.values()) >= 0 and sum(self.mixture.values()) > 0),
            f"stage {self.name}: mixture={self.mixture} needs shares >= 0 with a positive sum",
        )

    @property
    def microbatch_tokens(self) -> int:
        return self.microbatch_rows * self.seq_len


@dataclass(frozen=True)
class Scoring:
    """How documents are told apart by quality (report, section 2.2; spec section 5)."""

    by: Literal["signals", "classifiers"] = "signals"  # what one can read off a text, or scorers trained for the corpus
    contrasts: tuple[str, ...] = ()  # folders SCORER/good and SCORER/bad of labelled texts, added to the built-in ones
    judge: str = (
        ""  # an LLM's scores of mathematics: a JSONL file, or the http(s) address of an OpenAI-compatible endpoint
    )
    judge_model: str = ""
    judge_sample: int = 1000  # documents that the endpoint is asked about
    languages: tuple[str, ...] = ()  # of pages that are kept, as "en", "zh"; none named: all are

    def __post_init__(self):
        check_choices(self)
        own = [name for name in ("contrasts", "judge", "languages") if getattr(self, name)]
        require(
            self.by == "classifiers" or not own,
            f"scoring.by={self.by!r} reads no {', '.join(own)}; set scoring.by to classifiers",
        )
        require(
            not self.judge.startswith(("http://", "https://")) or bool(self.judge_model),
            f"scoring.judge={self.judge!r} is an endpoint; name its model with scoring.judge_model",
        )
        require(self.judge_sample >= 1, f"scoring.judge_sample={self.judge_sample} must be at least 1")


@dataclass(frozen=True)
class Data:
    """From documents to rows (report, section 2.2-2.3; spec sections 5-6)."""

    paths: tuple[str, ...] = ()  # folders of text added to the built-in sources
    seed: int = 0
    held_out: float = 0.05  # share of modules, packages and pages, chosen by the hash of their names
    tokenizer_bytes: int = 4_000_000  # of text that the BPE is trained on
    bucket_epochs: tuple[float, ...] = (0.0, 1.0, 1.0, 2.0, 3.2)  # quality buckets, lowest first; 0 drops
    duplicate_jaccard: float = 0.8
    max_document_bytes: int = 1_000_000
    cycles: Literal["fewest_missing", "least_feedback"] = field(  # which imports a repository's order gives up
        default="fewest_missing", metadata=SILENT_AT_DEFAULT
    )
    minhash: tuple[int, int] = field(default=(14, 8), metadata=SILENT_AT_DEFAULT)  # bands, rows of a band
    keep_duplicates: bool = field(
        default=False, metadata=SILENT_AT_DEFAULT
    )  # an ablation's arm; of held-out text none is kept
    shuffle_files: bool = field(default=False, metadata=SILENT_AT_DEFAULT)  # another: a repository's files in no order
    dialogues: int = field(
        default=0, metadata=SILENT_AT_DEFAULT
    )  # of reasoning, and of an agent, that are made and checked
    benchmarks: tuple[str, ...] = field(
        default=(), metadata=SILENT_AT_DEFAULT
    )  # files whose problems no text may contain
    semantic_kept: float = field(
        default=1.0, metadata=SILENT_AT_DEFAULT
    )  # share of pages that SemDedup leaves; 1: not run
    removals: bool = field(default=False, metadata=SILENT_AT_DEFAULT)  # a line for each duplicate: of what, how alike
    shard_tokens: int = field(default=0, metadata=SILENT_AT_DEFAULT)  # of an ArrayRecord shard; 0: rows in flat arrays
    scoring: Scoring = field(default=Scoring(), metadata=SILENT_AT_DEFAULT)
    corpus: str = field(
        default="", metadata=SILENT_AT_DEFAULT
    )  # fetched too: "default", or a file with a list of packages
    licences: tuple[str, ...] = field(
        default=(), metadata=SILENT_AT_DEFAULT
    )  # allowed in a corpus; empty: all known ones

    def __post_init__(self):
        check_choices(self)
        names = [PurePath(path).name for path in self.paths]
        require(
            len(set(names)) == len(names), f"paths={self.paths}: folders must differ in their last part; rename one"
        )
        require(0 < self.held_out < 0.5, f"held_out={self.held_out} must lie in (0, 0.5)")
        require(len(self.bucket_epochs) >= 1, "bucket_epochs is empty; give each quality bucket its epochs")
        require(min(self.bucket_epochs) >= 0, f"bucket_epochs={self.bucket_epochs} must not be negative")
        require(self.max_document_bytes >= 1, f"max_document_bytes={self.max_document_bytes} must be at least 1")
        require(self.dialogues >= 0, f"dialogues={self.dialogues} must not be negative; 0 makes none")
        require(min(self.minhash) >= 1, f"minhash={self.minhash} needs at least one band of at least one row")
        require(
            0 < self.semantic_kept <= 1, f"semantic_kept={self.semantic_kept} must lie in (0, 1]; 1 removes nothing"
        )
        require(self.shard_tokens >= 0, f"shard_tokens={self.shard_tokens} must not be negative; 0 is flat arrays")
        require(0 < self.duplicate_jaccard <= 1, f"duplicate_jaccard={self.duplicate_jaccard} must lie in (0, 1]")


@dataclass(frozen=True)
class Mesh:
    """Devices along each axis; -1 for one axis takes what is left. One device is a mesh of size one."""

    data: int = 1  # copies of the weights; goes over slices first
    fsdp: int = -1  # parts of each weight, gathered where a layer computes
    expert: int = 1  # shares of the experts, and of the vocabulary
    context: int = field(default=1, metadata=SILENT_AT_DEFAULT)  # parts of a row of tokens
    pipeline: int = field(default=1, metadata=SILENT_AT_DEFAULT)  # stages, each with its share of the MoE layers
    tensor: int = field(default=1, metadata=SILENT_AT_DEFAULT)  # parts of a layer's heads and hidden widths

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.expert, self.context, self.pipeline, self.tensor)
        require(
            all(n >= 1 or n == -1 for n in sizes) and sizes.count(-1) <= 1,
            f"mesh {sizes}: sizes are positive, at most one is -1",
        )


@dataclass(frozen=True)
class Loop:
    """What surrounds the steps: seeds, checkpoints, evaluation."""

    seed: int = 0
    checkpoint_every: int = 100  # steps
    keep_checkpoints: int = 2
    eval_bytes: int = 200_000  # of held-out text per domain
    eval_every: int = 0  # steps; 0: at the start and the end of a stage
    read_workers: int = field(default=0, metadata=SILENT_AT_DEFAULT)  # processes that read rows; 0: the trainer itself

    def __post_init__(self):
        require(0 <= self.seed < 2**31, f"seed={self.seed} must lie in 0..2^31-1")
        for name in ("checkpoint_every", "keep_checkpoints", "eval_bytes"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        require(self.eval_every >= 0, f"eval_every={self.eval_every} must not be negative; 0 is never on the way")
        require(self.read_workers >= 0, f"read_workers={self.read_workers} must not be negative; 0 reads without any")
