# mmdet's localisation distillation (arXiv 2102.12252), of boxes alone, with the settings of its own configs. Its loss
# is summed over the anchors with a box, not averaged: loss_weight is 0.25 for the 15 boxes that two images of COCO have
# on average, and 0.03 for the 109 boxes in a batch here.
_base_ = ['student_bccd.py']

model = dict(
    type='KnowledgeDistillationSingleStageDetector',
    bbox_head=dict(type='LDHead', loss_ld=dict(type='KnowledgeDistillationKLDivLoss', loss_weight=0.03, T=10)),
    teacher_config='configs/det/teacher_bccd.py',
    teacher_ckpt='checkpoints/bccd_teacher.pth',
)
