"Class activation maps: which cells of a layer moved a score."
from .cam import CAM, GradCAM, GradCAMPlusPlus, Heatmaps, Status
from .methods import (METHODS, AblationCAM, ClassActivationMap, EigenCAM, GradientFreeCAM, HiResCAM, LayerCAM, RandomCAM,
                      ScoreCAM, XGradCAM)

__all__ = ['METHODS', 'AblationCAM', 'CAM', 'ClassActivationMap', 'EigenCAM', 'GradCAM', 'GradCAMPlusPlus', 'GradientFreeCAM',
           'Heatmaps', 'HiResCAM', 'LayerCAM', 'RandomCAM', 'ScoreCAM', 'Status', 'XGradCAM']
