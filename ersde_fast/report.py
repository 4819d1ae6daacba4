"""What a calibration did, as the plan that it returned says it."""

from typing import NamedTuple


class CalibrationReport(NamedTuple):
    """`Plan.report` of a plan that `calibrate_plan` returned, and of its file.

    An error is that of the run by the ODE: the squared distance of a result from where the pilot run ends, a number, in variances of the
    pilot's results. Where many steps and few end at different samples it is near 1 to 2, so of few starts the mean says how many do, and
    the median how near the others end.

    Attributes:
        calibrated: False where the fit, and what is half way to it, was worse on the starts held back, in the mean and in the median of
            what the fit makes least, which counts the way to a result too: the plan is then the uncalibrated one.
        error_before, error_after: the mean on the starts that were fitted, of the uncalibrated plan and of the fitted one.
        held_back_before, held_back_after: the mean on the starts held back.
        median_before, median_after: the median there.
        variance: of the fitted plan's results about their mean, as a share of the pilot's; below 1 the results differ less.
        evaluations: of the model, for each start, the pilot's among them.
        starts: how many were fitted, and how many held back.
    """

    calibrated: bool
    error_before: float
    error_after: float
    held_back_before: float
    held_back_after: float
    median_before: float
    median_after: float
    variance: float
    evaluations: float
    starts: tuple[int, int]

    def __str__(self) -> str:
        fitted, held_back = self.starts
        return (
            f"{'calibrated' if self.calibrated else 'not calibrated, since worse on the starts held back'}: {fitted} starts fitted, "
            f"{held_back} held back, {self.evaluations:.0f} evaluations a start\n"
            f"errors in variances: fitted {self.error_before:.2g} to {self.error_after:.2g}, "
            f"held back {self.held_back_before:.2g} to {self.held_back_after:.2g} "
            f"(median {self.median_before:.2g} to {self.median_after:.2g})\n"
            f"variance of the results: {self.variance:.3f} of the pilot's"
        )
