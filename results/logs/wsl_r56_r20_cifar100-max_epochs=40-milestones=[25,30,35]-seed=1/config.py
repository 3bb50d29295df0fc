auto_scale_lr = dict(base_batch_size=64)
custom_hooks = [
    dict(type='mmwsl.EpochSeedHook'),
    dict(type='mmwsl.CheckTeacherHook'),
]
data_preprocessor = dict(
    mean=[
        129.285,
        124.0575,
        112.4295,
    ],
    num_classes=100,
    std=[
        68.1615,
        65.382,
        70.4055,
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
env_cfg = dict(
    cudnn_benchmark=False,
    dist_cfg=dict(backend='nccl'),
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0))
load_from = None
log_level = 'INFO'
model = dict(
    architecture=dict(
        _scope_='mmpretrain',
        backbone=dict(depth=20, type='mmwsl.CIFARResNet'),
        head=dict(
            in_channels=64,
            init_cfg=None,
            num_classes=100,
            type='LinearClsHead'),
        neck=dict(type='GlobalAveragePooling'),
        type='ImageClassifier'),
    distiller=dict(
        distill_losses=dict(
            loss_wsl=dict(loss_weight=2.25, tau=4.0, type='mmwsl.WSLLoss')),
        type='mmwsl.WSLDistiller'),
    teacher=dict(
        _scope_='mmpretrain',
        backbone=dict(depth=56, type='mmwsl.CIFARResNet'),
        head=dict(
            in_channels=64,
            init_cfg=None,
            num_classes=100,
            type='LinearClsHead'),
        neck=dict(type='GlobalAveragePooling'),
        type='ImageClassifier'),
    teacher_ckpt='checkpoints/resnet56_cifar100.pth',
    teacher_norm_eval=False,
    type='mmwsl.WSLDistill')
optim_wrapper = dict(
    dtype='bfloat16',
    optimizer=dict(lr=0.05, momentum=0.9, type='SGD', weight_decay=0.0005),
    type='AmpOptimWrapper')
param_scheduler = dict(
    by_epoch=True, gamma=0.1, milestones=[
        25,
        30,
        35,
    ], type='MultiStepLR')
randomness = dict(deterministic=False, seed=1)
resnet20 = dict(
    _scope_='mmpretrain',
    backbone=dict(depth=20, type='mmwsl.CIFARResNet'),
    head=dict(
        in_channels=64, init_cfg=None, num_classes=100, type='LinearClsHead'),
    neck=dict(type='GlobalAveragePooling'),
    type='ImageClassifier')
resnet56 = dict(
    _scope_='mmpretrain',
    backbone=dict(depth=56, type='mmwsl.CIFARResNet'),
    head=dict(
        in_channels=64, init_cfg=None, num_classes=100, type='LinearClsHead'),
    neck=dict(type='GlobalAveragePooling'),
    type='ImageClassifier')
resume = False
test_cfg = dict()
test_dataloader = dict(
    batch_size=256,
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        data_root='data/cifar100',
        pipeline=[
            dict(type='PackInputs'),
        ],
        split='test',
        type='CIFAR100'),
    num_workers=2,
    persistent_workers=True,
    pin_memory=True,
    sampler=dict(shuffle=False, type='DefaultSampler'))
test_evaluator = dict(
    topk=(
        1,
        5,
    ), type='Accuracy')
train_cfg = dict(by_epoch=True, max_epochs=40, val_interval=4)
train_dataloader = dict(
    batch_size=64,
    collate_fn=dict(type='mmwsl.already_collated'),
    dataset=dict(
        dataset=dict(
            data_root='data/cifar100',
            pipeline=[
                dict(type='PackInputs'),
            ],
            split='train',
            type='CIFAR100'),
        flip_prob=0.5,
        padding=4,
        type='mmwsl.DeviceDataset'),
    num_workers=0,
    persistent_workers=False,
    pin_memory=False,
    sampler=dict(shuffle=True, type='mmwsl.ViewSampler'))
val_cfg = dict()
val_dataloader = dict(
    batch_size=256,
    collate_fn=dict(type='mmwsl.already_collated'),
    dataset=dict(
        dataset=dict(
            data_root='data/cifar100',
            pipeline=[
                dict(type='PackInputs'),
            ],
            split='test',
            type='CIFAR100'),
        type='mmwsl.DeviceDataset'),
    num_workers=0,
    persistent_workers=False,
    pin_memory=False,
    sampler=dict(shuffle=False, type='DefaultSampler'))
val_evaluator = dict(
    topk=(
        1,
        5,
    ), type='Accuracy')
visualizer = dict(
    type='UniversalVisualizer', vis_backends=[
        dict(type='LocalVisBackend'),
    ])
wsl = dict(
    distill_losses=dict(
        loss_wsl=dict(loss_weight=2.25, tau=4.0, type='mmwsl.WSLLoss')),
    type='mmwsl.WSLDistiller')
