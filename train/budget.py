"""How much of its data a run may lose: an account over all ranks, and the line at which the run ends."""

import torch.distributed as dist

from train.data import Source
from train.exits import StopRun


class Budget:
    """What a run finds unusable while it trains.

    Args:
        source: the training source; what was left out when it was opened is not held against it.
        most: share of its samples above which the run ends.
    """

    def __init__(self, source: Source, most: float) -> None:
        self._source, self._most = source, most
        self._opened_without = len(source.skipped.samples)

    def found_bad(self) -> int:
        """Samples that this rank found unusable while training."""
        return len(self._source.skipped.samples) - self._opened_without

    def check(self, found_bad: float) -> None:
        """Ends a run that loses too much.

        Args:
            found_bad: samples found unusable while training, over all ranks.

        Raises:
            StopRun: they are more than the source may lose.
        """
        most = self._most * len(self._source)
        if found_bad <= most:
            return
        # Ranks meet one another's samples in later epochs; merged, each counts once.
        line = self.left_out()
        if (merged := self.found_bad()) > most:
            raise StopRun(
                f"{merged} of {len(self._source)} training samples cannot be used, data.max_left_out is {self._most}: "
                + line
            )

    def left_out(self) -> str:
        """What the run could not use, by cause, over all ranks; empty if nothing. All ranks call it."""
        account = self._source.skipped
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (account.samples, account.parts))
        for samples, found in parts:
            for name, cause in samples.items():
                account.sample(name, cause)
            account.add_parts(found)
        return account.line()
