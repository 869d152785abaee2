"""mini-swe-agent, unmodified: it runs the model's shell commands, given as tool calls, and as text."""

import os
import sys

os.environ.update(MSWEA_SILENT_STARTUP="1", MSWEA_COST_TRACKING="ignore_errors", LITELLM_LOCAL_MODEL_COST_MAP="True")

from minisweagent.agents.default import AgentConfig, DefaultAgent
from minisweagent.config import get_config_from_spec
from minisweagent.environments.local import LocalEnvironment
from minisweagent.models.litellm_model import LitellmModel
from minisweagent.models.litellm_textbased_model import LitellmTextbasedModel

base_url, api_key = sys.argv[1:]

for kind, name in ((LitellmModel, "mini"), (LitellmTextbasedModel, "mini_textbased")):
    config = get_config_from_spec(name)
    settings = {key: value for key, value in config["model"].items() if key != "model_kwargs"}
    model = kind(
        model_name="openai/policy",
        model_kwargs={**config["model"].get("model_kwargs", {}), "api_base": base_url, "api_key": api_key},
        **settings,
    )
    known = {key: value for key, value in config["agent"].items() if key in AgentConfig.model_fields}
    done = DefaultAgent(model, LocalEnvironment(), **known).run(f"Say hi, as {name} does.")
    assert done["exit_status"] == "Submitted", done
    assert "hi" in done["submission"], done
