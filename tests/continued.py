"""A run that is stopped and continued, beside the same run that is not."""

from collections.abc import Callable

from fewstep.training.trainer import Trainer


def whole_and_continued(trainer: Callable[..., Trainer], stop: int) -> tuple[Trainer, Trainer]:
    """Both after their last step.

    Args:
        trainer: makes one of ``(name of its folder, hooks)``. stop: the step after which the second one stops.
    """
    whole = trainer("whole")
    whole.run()
    trainer("parts", ((stop, lambda trainer: True),)).run()
    rest = trainer("parts")
    rest.run(resume=True)
    return whole, rest
