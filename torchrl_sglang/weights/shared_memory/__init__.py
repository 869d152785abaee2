"""Memory that the trainer shares with servers on its host: segments, the process that removes them, who can see them.

``transports`` imports its modules. It imports :class:`.TrainerMark` of ``group``, which names the segments' owner.
"""
