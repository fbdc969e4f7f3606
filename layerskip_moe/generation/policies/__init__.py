"""Drafting policies of self-speculation: how many tokens to draft, with which layers, and when to stop. Start at
`policy.py`."""

from layerskip_moe.generation.policies.adaptive import Adaptive
from layerskip_moe.generation.policies.cascade import Cascade
from layerskip_moe.generation.policies.draft_verify import DraftVerify
from layerskip_moe.generation.policies.dynamic_exit_layer import DEL
from layerskip_moe.generation.policies.fixed import Fixed
from layerskip_moe.generation.policies.heuristic import Heuristic
from layerskip_moe.generation.policies.policy import Policy, RoundReport
from layerskip_moe.nn.ragged import MarginRule, Stage

__all__ = [
    "DEL",
    "Adaptive",
    "Cascade",
    "DraftVerify",
    "Fixed",
    "Heuristic",
    "MarginRule",
    "Policy",
    "RoundReport",
    "Stage",
]
