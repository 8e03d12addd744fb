"""How good a model is: the judge, distances, attention's measures, evaluation."""
