"""What the training recipes in ``examples/`` share; each idea a file, none of them knows the others' loop.

A recipe is one file, read from top to bottom: it loads a configuration, opens a run folder, builds servers, policy and
scheme from YAML, and has its own loop of collecting, training and syncing. From here come the parts that look the same
in all of them.
"""

from torchrl_sglang.model_files import load_tokenizer
from torchrl_sglang.recipes.batch.advantages import token_advantages, token_rewards, whiten
from torchrl_sglang.recipes.batch.conversations import Conversations
from torchrl_sglang.recipes.batch.importance import masked_importance_weights, truncated_importance_weights
from torchrl_sglang.recipes.batch.rows import batch_numbers
from torchrl_sglang.recipes.batch.samples import sample_lines
from torchrl_sglang.recipes.batch.sequences import Sequences
from torchrl_sglang.recipes.batch.statistics import (
    effective_sample_size,
    kl_estimates,
    staleness_histogram,
    staleness_text,
    training_signal,
)
from torchrl_sglang.recipes.data.environment import make_env, make_test_env
from torchrl_sglang.recipes.data.questions import Question, QuestionStream
from torchrl_sglang.recipes.data.rewards import RewardTransform
from torchrl_sglang.recipes.data.tasks import Task, make_task
from torchrl_sglang.recipes.losses.clipped import clipped_policy_loss, clipped_value_loss
from torchrl_sglang.recipes.losses.critic import Critic
from torchrl_sglang.recipes.losses.reference import make_reference, score_on_servers
from torchrl_sglang.recipes.losses.scoring import TokenScores, hidden_states, score_in_parts, score_tokens
from torchrl_sglang.recipes.run.background import BackgroundRollouts
from torchrl_sglang.recipes.run.checkpoints import Checkpoint, Checkpoints
from torchrl_sglang.recipes.run.clock import StepClock
from torchrl_sglang.recipes.run.evaluation import evaluate, pass_at_k
from torchrl_sglang.recipes.run.interrupt import StopRequest
from torchrl_sglang.recipes.run.report import draw_report
from torchrl_sglang.recipes.run.run_folder import RunFolder
from torchrl_sglang.recipes.run.table import Table, read_metrics
from torchrl_sglang.recipes.run.training_run import Run
from torchrl_sglang.recipes.setup.config import (
    Arguments,
    add_arguments,
    load_config,
    override,
    parse_arguments,
    presets_of,
    read_arguments,
)
from torchrl_sglang.recipes.setup.devices import trainer_device
from torchrl_sglang.recipes.setup.memory import keep_freed_memory, peak_memory_gb
from torchrl_sglang.recipes.setup.models import load_model, save_model
from torchrl_sglang.recipes.setup.optimizer import make_optimizer
from torchrl_sglang.recipes.setup.program import run_program
from torchrl_sglang.recipes.setup.ray_serving import RayServing, end_ray_collector
from torchrl_sglang.recipes.setup.serving import Serving
from torchrl_sglang.recipes.setup.settings import CheckpointSettings, EvaluateSettings, RunSettings, TrainSettings
from torchrl_sglang.recipes.tools.episodes import PythonTool, evaluate_with_tool, make_tool_env
from torchrl_sglang.recipes.tools.python_tool import ProgramResult, run_python

__all__ = [
    "Arguments",
    "BackgroundRollouts",
    "Checkpoint",
    "CheckpointSettings",
    "Checkpoints",
    "Conversations",
    "Critic",
    "EvaluateSettings",
    "ProgramResult",
    "PythonTool",
    "Question",
    "QuestionStream",
    "RayServing",
    "RewardTransform",
    "Run",
    "RunFolder",
    "RunSettings",
    "Sequences",
    "Serving",
    "StepClock",
    "StopRequest",
    "Table",
    "Task",
    "TokenScores",
    "TrainSettings",
    "add_arguments",
    "batch_numbers",
    "clipped_policy_loss",
    "clipped_value_loss",
    "draw_report",
    "effective_sample_size",
    "end_ray_collector",
    "evaluate",
    "evaluate_with_tool",
    "hidden_states",
    "keep_freed_memory",
    "kl_estimates",
    "load_config",
    "load_model",
    "load_tokenizer",
    "make_env",
    "make_optimizer",
    "make_reference",
    "make_task",
    "make_test_env",
    "make_tool_env",
    "masked_importance_weights",
    "override",
    "parse_arguments",
    "pass_at_k",
    "peak_memory_gb",
    "presets_of",
    "read_arguments",
    "read_metrics",
    "run_program",
    "run_python",
    "sample_lines",
    "save_model",
    "score_in_parts",
    "score_on_servers",
    "score_tokens",
    "staleness_histogram",
    "staleness_text",
    "token_advantages",
    "token_rewards",
    "trainer_device",
    "training_signal",
    "truncated_importance_weights",
    "whiten",
]
