auto_scale_lr = dict(base_batch_size=50)
custom_hooks = [
    dict(type='mmwsl.EpochSeedHook'),
    dict(type='mmwsl.CheckTeacherHook'),
    dict(type='mmwsl.CheckResumeHook'),
    dict(type='mmwsl.FiniteLossHook'),
    dict(type='mmwsl.LossStatisticsHook'),
]
data_preprocessor = dict(
    mean=[
        4.9,
    ],
    num_classes=10,
    std=[
        6.0,
    ],
    to_rgb=False,
    type='ClsDataPreprocessor')
default_hooks = dict(
    checkpoint=dict(interval=1, max_keep_ckpts=2, type='CheckpointHook'),
    logger=dict(interval=100, type='LoggerHook'),
    param_scheduler=dict(type='ParamSchedulerHook'),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    timer=dict(type='IterTimerHook'),
    visualization=dict(enable=False, type='VisualizationHook'))
default_scope = 'mmpretrain'
digits_student = dict(
    _scope_='mmpretrain',
    backbone=dict(
        base_channels=2,
        depth=8,
        in_channels=1,
        stem_channels=2,
        type='mmwsl.CIFARResNet'),
    head=dict(in_channels=8, num_classes=10, type='LinearClsHead'),
    neck=dict(type='GlobalAveragePooling'),
    type='ImageClassifier')
digits_teacher = dict(
    _scope_='mmpretrain',
    backbone=dict(depth=14, in_channels=1, type='mmwsl.CIFARResNet'),
    head=dict(in_channels=64, num_classes=10, type='LinearClsHead'),
    neck=dict(type='GlobalAveragePooling'),
    type='ImageClassifier')
dist = dict(
    distill_losses=dict(
        loss_dist=dict(
            loss=dict(beta=1.0, gamma=1.0, tau=4.0, type='DIST'),
            loss_weight=2.0,
            type='mmwsl.WeightedLoss')),
    type='mmwsl.WSLDistiller')
env_cfg = dict(
    cudnn_benchmark=False,
    dist_cfg=dict(backend='nccl'),
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0))
launcher = 'none'
load_from = None
log_level = 'INFO'
model = dict(
    architecture=dict(
        _scope_='mmpretrain',
        backbone=dict(
            base_channels=2,
            depth=8,
            in_channels=1,
            stem_channels=2,
            type='mmwsl.CIFARResNet'),
        head=dict(in_channels=8, num_classes=10, type='LinearClsHead'),
        neck=dict(type='GlobalAveragePooling'),
        type='ImageClassifier'),
    distiller=dict(
        distill_losses=dict(
            loss_dist=dict(
                loss=dict(beta=1.0, gamma=1.0, tau=4.0, type='DIST'),
                loss_weight=2.0,
                type='mmwsl.WeightedLoss',
                weighting=dict(type='WSLWeighting'))),
        type='mmwsl.WSLDistiller'),
    teacher=dict(
        _scope_='mmpretrain',
        backbone=dict(depth=14, in_channels=1, type='mmwsl.CIFARResNet'),
        head=dict(in_channels=64, num_classes=10, type='LinearClsHead'),
        neck=dict(type='GlobalAveragePooling'),
        type='ImageClassifier'),
    teacher_ckpt='work_dirs/sweep/digits_teacher-seed=0/epoch_30.pth',
    teacher_norm_eval=False,
    type='mmwsl.WSLDistill')
optim_wrapper = dict(
    optimizer=dict(
        lr=0.1, momentum=0.9, nesterov=True, type='SGD', weight_decay=0.0005))
param_scheduler = dict(
    by_epoch=True,
    convert_to_iter_based=True,
    eta_min=0.0,
    type='CosineAnnealingLR')
randomness = dict(deterministic=False, seed=5)
resume = True
test_cfg = dict()
test_dataloader = dict(
    batch_size=400,
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        pipeline=[
            dict(type='PackInputs'),
        ],
        split='test',
        type='mmwsl.Digits'),
    num_workers=0,
    persistent_workers=False,
    pin_memory=False,
    sampler=dict(shuffle=False, type='DefaultSampler'))
test_evaluator = dict(topk=(1, ), type='Accuracy')
train_cfg = dict(by_epoch=True, max_epochs=10, val_interval=1)
train_dataloader = dict(
    batch_size=50,
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        dataset=dict(
            pipeline=[
                dict(type='PackInputs'),
            ],
            split='train',
            type='mmwsl.Digits'),
        type='mmwsl.SeededViews'),
    num_workers=0,
    persistent_workers=False,
    pin_memory=False,
    sampler=dict(shuffle=True, type='mmwsl.ViewSampler'))
val_cfg = dict()
val_dataloader = dict(
    batch_size=400,
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        pipeline=[
            dict(type='PackInputs'),
        ],
        split='test',
        type='mmwsl.Digits'),
    num_workers=0,
    persistent_workers=False,
    pin_memory=False,
    sampler=dict(shuffle=False, type='DefaultSampler'))
val_evaluator = dict(topk=(1, ), type='Accuracy')
visualizer = dict(
    type='UniversalVisualizer', vis_backends=[
        dict(type='LocalVisBackend'),
    ])
work_dir = 'work_dirs/sweep/wsl-dist_digits-seed=5'
wsl = dict(
    distill_losses=dict(
        loss_wsl=dict(loss_weight=2.25, tau=4.0, type='mmwsl.WSLLoss')),
    type='mmwsl.WSLDistiller')
