_base_ = 'wsl_r56_r20_cifar100.py'

# made by: tools/cache_teacher.py configs/wsl_r56_r20_cifar100.py --views V
model = dict(teacher_cache='work_dirs/wsl_r56_r20_cifar100/teacher_cache')
train_dataloader = dict(dataset=dict(type='mmwsl.CachedViews', cache='work_dirs/wsl_r56_r20_cifar100/teacher_cache'))
