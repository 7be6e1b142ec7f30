"""The ground floor: schedules, predictions, closed-form Gaussian mixtures. Needs torch and numpy alone."""

from fewstep.diffusion.prediction import PREDICTION_TYPES, Prediction, PredictionType
from fewstep.diffusion.schedule import Schedule

__all__ = ["PREDICTION_TYPES", "Prediction", "PredictionType", "Schedule"]
