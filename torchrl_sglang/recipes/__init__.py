"""Building blocks of the training recipes in ``examples/``.

A recipe is one file: it loads a configuration, opens a run folder, builds servers, policy and weight sync from YAML,
and has its own loop of collecting, training and syncing. This package has the parts that are the same in all recipes.

Its folders form layers; each may import those to its left: setup < data < batch < losses < run < tools.
"""

import torchrl_sglang.recipes.available  # noqa: F401  it raises when a needed package is missing
from torchrl_sglang.model_files import load_tokenizer
from torchrl_sglang.recipes.batch.advantages import token_advantages, token_rewards, whiten
from torchrl_sglang.recipes.batch.conversations import Conversations
from torchrl_sglang.recipes.batch.group_advantage import GroupAdvantage
from torchrl_sglang.recipes.batch.importance import truncated_importance_weights
from torchrl_sglang.recipes.batch.rows import batch_numbers
from torchrl_sglang.recipes.batch.samples import sample_lines
from torchrl_sglang.recipes.batch.sequences import Sequences
from torchrl_sglang.recipes.batch.statistics import training_signal
from torchrl_sglang.recipes.data.environment import make_env, make_test_env
from torchrl_sglang.recipes.data.evaluation import evaluate, pass_at_k
from torchrl_sglang.recipes.data.questions import Question, QuestionStream
from torchrl_sglang.recipes.data.tasks import Task, make_task
from torchrl_sglang.recipes.losses.clipped import clipped_policy_loss, clipped_value_loss
from torchrl_sglang.recipes.losses.critic import Critic
from torchrl_sglang.recipes.losses.grpo_actor import GRPOActor, make_grpo_loss
from torchrl_sglang.recipes.losses.reference import make_reference
from torchrl_sglang.recipes.losses.scoring import hidden_states, score_in_parts, score_tokens
from torchrl_sglang.recipes.run.background import BackgroundRollouts
from torchrl_sglang.recipes.run.checkpoints import Checkpoint, Checkpoints
from torchrl_sglang.recipes.run.report import draw_report
from torchrl_sglang.recipes.run.table import read_metrics
from torchrl_sglang.recipes.run.training_run import Run
from torchrl_sglang.recipes.setup.arguments import parse_arguments
from torchrl_sglang.recipes.setup.config import load_config
from torchrl_sglang.recipes.setup.models import load_model, save_model
from torchrl_sglang.recipes.setup.optimizer import make_optimizer
from torchrl_sglang.recipes.setup.program import run_program
from torchrl_sglang.recipes.setup.ray_serving import RayServing, end_ray_collector
from torchrl_sglang.recipes.setup.serving import Serving
from torchrl_sglang.recipes.setup.settings import TrainSettings
from torchrl_sglang.recipes.tools.episodes import PythonTool, evaluate_with_tool, make_tool_env
from torchrl_sglang.recipes.tools.python_tool import run_python

__all__ = [
    "BackgroundRollouts",
    "Checkpoint",
    "Checkpoints",
    "Conversations",
    "Critic",
    "GRPOActor",
    "GroupAdvantage",
    "PythonTool",
    "Question",
    "QuestionStream",
    "RayServing",
    "Run",
    "Sequences",
    "Serving",
    "Task",
    "TrainSettings",
    "batch_numbers",
    "clipped_policy_loss",
    "clipped_value_loss",
    "draw_report",
    "end_ray_collector",
    "evaluate",
    "evaluate_with_tool",
    "hidden_states",
    "load_config",
    "load_model",
    "load_tokenizer",
    "make_env",
    "make_grpo_loss",
    "make_optimizer",
    "make_reference",
    "make_task",
    "make_test_env",
    "make_tool_env",
    "parse_arguments",
    "pass_at_k",
    "read_metrics",
    "run_program",
    "run_python",
    "sample_lines",
    "save_model",
    "score_in_parts",
    "score_tokens",
    "token_advantages",
    "token_rewards",
    "training_signal",
    "truncated_importance_weights",
    "whiten",
]
