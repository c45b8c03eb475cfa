"""Somebody's code on the gate's cases: each module that it shares with HF, judged as it answers."""
