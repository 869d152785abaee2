"""SGLang servers on a Ray cluster: one actor and one placement-group bundle each, on whichever node has room.

::

    ray.init(address="auto")
    with launch_on_ray("Qwen/Qwen3-8B", num_servers=4, tp_size=2) as engine:
        policy, scheme = SGLangWrapper(engine), SGLangWeightSyncScheme(engine)

Each actor starts its server on its own node, with the GPUs that Ray gave to the actor, and the server listens on the
node's address. A server never outlives its actor, and an actor never outlives the program that launched it. Prompts and
weights go directly between the trainer and the servers, as without Ray.

Import the names below from this package; its modules are private to it.
"""

from torchrl_sglang.ray_servers.launch import launch_on_ray
from torchrl_sglang.ray_servers.placement import RayPlacement
from torchrl_sglang.ray_servers.ray_calls import import_ray
from torchrl_sglang.ray_servers.server import RayServer

__all__ = ["RayPlacement", "RayServer", "import_ray", "launch_on_ray"]
