"""What a calibration did, as the plan that it returned says it."""

from typing import NamedTuple


class CalibrationReport(NamedTuple):
    """`Plan.report` of a plan that `calibrate_plan` returned, and of its file.

    An error is that of the run by the ODE: the mean squared distance of a result from where the pilot run ends, in variances of the
    pilot's results; of several starts the median, since one that ends on another side of a watershed says little.

    Attributes:
        calibrated: False where the fit was worse on the starts held back: the plan is then the uncalibrated one.
        error_before, error_after: on the starts that were fitted, of the uncalibrated plan and of the fitted one.
        held_back_before, held_back_after: on the starts held back.
        variance: of the fitted plan's results about their mean, as a share of the pilot's; below 1 the results differ less.
        evaluations: of the model, for each start, the pilot's among them.
        starts: how many were fitted, and how many held back.
    """

    calibrated: bool
    error_before: float
    error_after: float
    held_back_before: float
    held_back_after: float
    variance: float
    evaluations: float
    starts: tuple[int, int]
