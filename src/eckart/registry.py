"""Everything that users choose by name. A new method, statistic, form or recovery is one file and one line here.

A line says where an object is defined; it is imported when it is first asked for. What tables and `--help` show of it
is read from its source (:meth:`eckart.lookup.registry.Registry.about`), so that they come without importing torch.
"""

from __future__ import annotations

from typing import Any, TypeVar

from eckart.lookup.registry import Registry

T = TypeVar("T")

METHODS: Registry[Any] = Registry(
    "method",
    {
        "eckart": "eckart.methods.eckart:METHOD",
        "svd": "eckart.methods.svd:METHOD",
        "fwsvd": "eckart.methods.fwsvd:METHOD",
        "fwsvd-columns": "eckart.methods.fwsvd:COLUMNS",
        "asvd": "eckart.methods.asvd:METHOD",
        "drone": "eckart.methods.drone:METHOD",
        "svd-llm": "eckart.methods.svd_llm:METHOD",
        "kfac": "eckart.methods.kfac:METHOD",
        "lems": "eckart.methods.lems:METHOD",
        "aa-svd": "eckart.methods.aa_svd:METHOD",
        "modegpt": "eckart.methods.modegpt:METHOD",
        "basis-sharing": "eckart.methods.basis_sharing:METHOD",
        "kronecker": "eckart.methods.kronecker:METHOD",
        "kngpt2": "eckart.methods.kronecker:KNGPT2",
    },
)
"""Papers' procedures: a metric and settings for everything else (`--method`, `--metric`)."""

STATISTICS: Registry[Any] = Registry(
    "statistic",
    {
        "mean": "eckart.moments.mean:Mean",
        "gram": "eckart.moments.gram:Gram",
        "absolute": "eckart.moments.absolute:Absolute",
        "gradients": "eckart.moments.gradients:GradientGram",
        "robust-gradients": "eckart.moments.robust_gradients:RobustGradientGram",
        "fisher": "eckart.moments.fisher:Fisher",
    },
)
"""Sums over the calibration text that metrics read (`Method.needs`)."""

FORMS: Registry[Any] = Registry(
    "form",
    {
        "lowrank": "eckart.forms.lowrank:LowRank",
        "pivoted": "eckart.forms.pivoted:Pivoted",
        "joint": "eckart.forms.joint:Joint",
        "pivoted-joint": "eckart.forms.pivoted_joint:PivotedJoint",
        "kronecker": "eckart.forms.kronecker:Kronecker",
        "shared-basis": "eckart.forms.shared_basis:SharedBasis",
        "sliced": "eckart.forms.sliced:Sliced",
    },
)
"""How the weight of a Linear or Conv1D can be stored: what a plan can choose (`--form`)."""

EMBEDDINGS: Registry[Any] = Registry(
    "form of embeddings",
    {
        "lowrank": "eckart.forms.lowrank_embedding:LowRankEmbedding",
        "kronecker": "eckart.forms.kronecker_embedding:KroneckerEmbedding",
        "safe": "eckart.forms.safe_embedding:SafeEmbedding",
    },
)
"""How a table of token embeddings can be stored (`--embeddings`)."""

OTHER_FORMS: Registry[Any] = Registry(
    "form",
    {
        "lowrank-sparse": "eckart.forms.lowrank_sparse:LowRankSparse",
        "tied-head": "eckart.forms.tied_head:TiedHead",
    },
)
"""What recoveries and tied output layers store; no plan chooses it."""

RECOVERIES: Registry[Any] = Registry(
    "recovery",
    {
        "full": "eckart.recovery.full:Full",
        "refit": "eckart.recovery.refit:Refit",
        "block": "eckart.recovery.block:Block",
        "distil": "eckart.recovery.distil:Distil",
        "noach-goldberg": "eckart.recovery.distil:NoachGoldberg",
        "ilkd": "eckart.recovery.distil:InterLayer",
        "lora": "eckart.recovery.lora:LoRA",
        "losparse": "eckart.recovery.losparse:LoSparse",
        "losparse-distil": "eckart.recovery.losparse:LoSparseDistilled",
        "dsee": "eckart.recovery.dsee:DSEE",
        "sandwich": "eckart.recovery.sandwich:Sandwich",
        "early-exit": "eckart.recovery.early_exit:EarlyExitRecovery",
        "token-skipping": "eckart.recovery.token_skipping:TokenSkippingRecovery",
    },
)
"""Ways to make quality come back (`--recovery`)."""

BEHAVIORS: Registry[Any] = Registry(
    "behavior",
    {
        "token-skipping": "eckart.adaptive.token_skipping:TokenSkipping",
        "early-exit": "eckart.adaptive.early_exit:EarlyExit",
    },
)
"""How a model does less for easy inputs: what is attached to it, in the order in which it acts."""

EXPORTS: Registry[Any] = Registry(
    "format",
    {
        "dense": "eckart.exports.densify:Dense",
        "factored": "eckart.exports.factored:Factored",
        "onnx": "eckart.exports.engines.onnx:Onnx",
        "openvino": "eckart.exports.engines.openvino:OpenVino",
        "remote-code": "eckart.exports.remote_code.exporter:RemoteCode",
    },
)
"""Folders for programs without eckart (`eckart export --format`)."""


def register_method(method: T) -> T:
    """Make a :class:`eckart.Method` of your own known under its `name`, in this process."""
    METHODS.add(method.name, method)  # type: ignore[attr-defined]
    return method


def register_recovery(recovery: T) -> T:
    """Make a recovery of your own, a class on :class:`eckart.Recovery`, known under its `name`, in this process."""
    RECOVERIES.add(recovery.name, recovery)  # type: ignore[attr-defined]
    return recovery
