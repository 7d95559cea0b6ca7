"""The native path: one small decoder from data, for the families whose config we read ourselves."""
