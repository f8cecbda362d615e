"""Depth report on one or two models: metrics, figures and one HTML page."""
