"""The state machine of SGLang's control plane, with SGLang's messages. No threads, no sockets.

Each method returns ``(ok, message)``; a refusal does not change the state.
"""

from __future__ import annotations

from typing import Literal

__all__ = ["ControlState", "EnginePause", "Result"]

EnginePause = Literal["running", "retract", "in_place"]
"""Whether the scheduler decodes, or is paused with running requests moved to the queue or kept in place."""

Result = tuple[bool, str]


class ControlState:
    """The state that one server's scheduler keeps between control calls.

    Args:
        has_session: whether updates need ``begin`` and ``end`` around them (SGLang from 0.5.21 on).
        weight_version: weight version at the start.

    Examples:
        >>> state = ControlState(has_session=True)
        >>> state.may_update("g")[1]
        'update_weights_from_distributed must run between begin_weight_update() and end_weight_update()'
        >>> state.begin(), state.begin()[0]
        ((True, 'Success'), False)
    """

    def __init__(self, *, has_session: bool, weight_version: str = "default") -> None:
        self.has_session = has_session
        self.session_open = False
        self.weight_version = weight_version
        self.engine: EnginePause = "running"
        self.groups: dict[str, None] = {}

    def begin(self) -> Result:
        """Open the weight-update session."""
        if self.session_open:
            return False, "a weight-update session is already open; call end_weight_update() first"
        self.session_open = True
        return True, "Success"

    def end(self) -> Result:
        """Close the weight-update session, whether or not anything was loaded in it."""
        if not self.session_open:
            return False, "no weight-update session is open; call begin_weight_update() first"
        self.session_open = False
        return True, "Success"

    def may_update(self, group: str) -> Result:
        """Whether an update over ``group`` may join its collective now."""
        if self.has_session and not self.session_open:
            return False, (
                "update_weights_from_distributed must run between begin_weight_update() and end_weight_update()"
            )
        if group not in self.groups:
            return False, (
                f"Failed to receive weights: Group {group} not in {list(self.groups)}. "
                "Please call `init_weights_update_group` first."
            )
        return True, ""

    def may_join(self, group: str) -> Result:
        """Whether a group of this name may be formed. SGLang checks that only after it has connected to the store."""
        if group in self.groups:
            return False, (
                "Failed to initialize custom process group: The specified group name has already been created, "
                "please use a different group name."
            )
        return True, "Succeeded to initialize custom process group."

    def joined(self, group: str) -> None:
        """Record that the group was formed."""
        self.groups[group] = None

    def leave(self, group: str) -> Result:
        """Remove a group."""
        if group not in self.groups:
            return False, "The group to be destroyed does not exist."
        del self.groups[group]
        return True, "Succeeded to destroy custom process group."

    def may_flush(self, *, running: int, waiting: int) -> bool:
        """Whether the prefix cache can be cleared: no request runs, and none is queued.

        During a pause queued requests do not matter, except for servers without a session (up to 0.5.20).
        """
        return running == 0 and (waiting == 0 or (self.has_session and self.engine != "running"))
