"""Steps of a model as recorded programs, and which of them were proved before."""
