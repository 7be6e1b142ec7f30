"""Closed forms that built-in methods and their parts must agree with, as rows of `fewstep.verification.report`."""
