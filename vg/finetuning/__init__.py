"""Fine-tuning on a folder of annotated images: finds its format, checks it, plans a run, and trains.

plan.py      from a folder to the configuration of a run
recipe.py    the model and its settings of training, from the recipes in configs/
sizes.py     epochs by the number of samples, batch size by the memory
run.py       trains a plan and reports what it gained
"""
