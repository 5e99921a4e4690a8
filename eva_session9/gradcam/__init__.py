"Class activation maps: which cells of a layer moved a score."
from .cam import CAM, GradCAM, GradCAMPlusPlus, Heatmaps, Status
from .methods import (METHODS, AblationCAM, ClassActivationMap, EigenCAM, GradientFreeCAM, HiResCAM, LayerCAM, RandomCAM,
                      ScoreCAM, XGradCAM)
from .metrics import (area_under, bootstrap, cascade, centre_gaussian, confidence, confidence_drop, deletion, energy_in,
                      fill_in, insertion, logit_similarity, matched_iou, oracle, pointing,
                      randomized, ranks, road, road_score, spearman)

__all__ = ['AblationCAM', 'CAM', 'ClassActivationMap', 'EigenCAM', 'GradCAM', 'GradCAMPlusPlus', 'GradientFreeCAM',
           'Heatmaps', 'HiResCAM', 'LayerCAM', 'METHODS', 'RandomCAM', 'ScoreCAM', 'Status', 'XGradCAM',
           'area_under', 'bootstrap', 'cascade', 'centre_gaussian', 'confidence', 'confidence_drop',
           'deletion', 'energy_in', 'fill_in', 'insertion', 'logit_similarity', 'matched_iou', 'oracle',
           'pointing', 'randomized', 'ranks', 'road', 'road_score', 'spearman']
