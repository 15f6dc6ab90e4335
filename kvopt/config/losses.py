"""What a loss is: the ``loss`` section of a student, callable on gold tokens. Each file of ``train/losses/`` is one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from kvopt.config.kinds import Family, Options

LOSSES: Family[Loss] = Family("kvopt.train.losses", "loss")
Anchor = Literal["none", "original", "same", "other"]


class Loss(Options):
    """A loss with its options.

    A member also has ``anchor``, which says under what the frozen base is run for it: under nothing, under the original
    template (its stored reference), or under the context that the student sees; with "other" the student itself is the
    anchor, as it is now, under another of its contexts. It is an option, or a class attribute where there is no choice.

    Attributes:
        draws: the student draws the answers itself, so gold outputs are not used.
    """

    draws: ClassVar[bool] = False

    if TYPE_CHECKING:

        @property
        def anchor(self) -> Anchor:
            """What the base sees, or with "other" the student."""

    def __call__(self, gold: Any) -> Any:
        """Nats per gold token [G], a float32 torch tensor through which gradients flow.

        Args:
            gold: the :class:`kvopt.train.gold_tokens.Gold` of some rows.
        """
        raise NotImplementedError
