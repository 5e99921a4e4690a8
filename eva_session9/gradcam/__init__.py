"Class activation maps: which cells of a layer moved a score."
from .cam import CAM, GradCAM, GradCAMPlusPlus, Heatmaps, Status

__all__ = ['CAM', 'GradCAM', 'GradCAMPlusPlus', 'Heatmaps', 'Status']
