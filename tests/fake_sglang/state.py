"""The state machine of SGLang's control plane: who may do what when, in SGLang's own words. No thread, no socket.

Each method answers ``(ok, message)``; a refusal leaves the state as it was.
"""

from __future__ import annotations

from typing import Literal

__all__ = ["ControlState", "EnginePause", "Verdict"]

EnginePause = Literal["running", "retract", "in_place"]
"""What the scheduler does: run, or stand still (requests sent back to the queue, or frozen where they are)."""

Verdict = tuple[bool, str]


class ControlState:
    """What one server's scheduler remembers between control calls.

    Args:
        has_session: whether updates need ``begin`` and ``end`` around them (SGLang from 0.5.21 on).
        weight_version: version to start with.

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

    def begin(self) -> Verdict:
        """Open the weight-update session."""
        if self.session_open:
            return False, "a weight-update session is already open; call end_weight_update() first"
        self.session_open = True
        return True, "Success"

    def end(self) -> Verdict:
        """Close the weight-update session. Whether anything was loaded in it is not asked."""
        if not self.session_open:
            return False, "no weight-update session is open; call begin_weight_update() first"
        self.session_open = False
        return True, "Success"

    def may_update(self, group: str) -> Verdict:
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

    def may_join(self, group: str) -> Verdict:
        """Whether a group of this name may be made. SGLang asks only after it has reached the store."""
        if group in self.groups:
            return False, (
                "Failed to initialize custom process group: The specified group name has already been created, "
                "please use a different group name."
            )
        return True, "Succeeded to initialize custom process group."

    def joined(self, group: str) -> None:
        """The group was made."""
        self.groups[group] = None

    def leave(self, group: str) -> Verdict:
        """Forget a group."""
        if group not in self.groups:
            return False, "The group to be destroyed does not exist."
        del self.groups[group]
        return True, "Succeeded to destroy custom process group."

    def may_flush(self, *, running: int, waiting: int) -> bool:
        """Whether the prefix cache can be dropped: nothing running, nothing queued.

        While paused queued requests don't matter, but for servers without a session (up to 0.5.20) they do.
        """
        return running == 0 and (waiting == 0 or (self.has_session and self.engine != "running"))
