"""Schedules, predictions and closed-form Gaussian mixtures; they need torch and numpy alone."""

from fewstep.diffusion.prediction import PREDICTION_TYPES, Prediction, PredictionType
from fewstep.diffusion.schedule import Schedule

__all__ = ["PREDICTION_TYPES", "Prediction", "PredictionType", "Schedule"]
