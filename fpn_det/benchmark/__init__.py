"""Speed, memory and operator counts beside torchvision's Faster R-CNN, measured in the same process."""
