# mmdet's localisation distillation (arXiv 2102.12252), of boxes alone, with the settings of its own configs.
_base_ = ['student_bccd.py']

model = dict(
    type='KnowledgeDistillationSingleStageDetector',
    bbox_head=dict(type='LDHead', loss_ld=dict(type='KnowledgeDistillationKLDivLoss', loss_weight=0.25, T=10)),
    teacher_config='configs/det/teacher_bccd.py',
    teacher_ckpt='checkpoints/bccd_teacher.pth',
)
