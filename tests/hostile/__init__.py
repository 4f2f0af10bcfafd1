"""What a stranger may hand over: folders, weights and images that are made to do harm.

corpus.py     what a case is, and the list of all
workdirs.py   workdirs; data.py, hubs.py, weights.py, images.py: likewise
states.py     checkpoints of workdirs, and copies of runs
test_corpus.py  every case against the commands that read it
"""
