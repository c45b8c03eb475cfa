"""Files from anywhere: whatever is damaged or hostile in them is one line, within bounds of time and memory; nothing is
written outside of where it was asked for; and what means another model never passes for this one."""
