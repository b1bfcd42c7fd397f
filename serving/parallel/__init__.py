"""One model on several devices: which share each rank holds, and how ranks add up what they computed."""
