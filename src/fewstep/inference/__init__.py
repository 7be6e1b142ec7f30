"""Sampling from runs, exports, published files and teachers: from Python, the command line or a page."""
