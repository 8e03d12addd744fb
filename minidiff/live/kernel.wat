;; The one piece of the runtime that is not JavaScript: products of matrices, and the
;; exponential function, four numbers at a time.
;;
;; matmul: y += x · w. x (rows, inner) and y (rows, columns) lie row by row, `x_stride` and
;; `y_stride` bytes apart; w lies in panels of eight columns, (columns / 8, inner, 8). A
;; tile of four rows and eight columns of y stays in registers while a row of the panel
;; after the other is multiplied with a column of x. `rows` counts up to a multiple of
;; four, so the buffers of x and y must end no earlier. Rows of x may overlap.
;;
;; exp: x ← exp(x − most), and gate: x ← x · sigmoid(a·x + b·x³), both in place for
;; `count` numbers from `x` on, counted up to a multiple of four.
(module
  (import "minidiff" "memory" (memory 1))
  (func (export "matmul")
    (param $x i32) (param $w i32) (param $y i32)
    (param $rows i32) (param $inner i32) (param $columns i32)
    (param $x_stride i32) (param $y_stride i32)
    (local $row i32) (local $k i32) (local $panel i32)
    (local $x0 i32) (local $x1 i32) (local $x2 i32) (local $x3 i32)
    (local $y0 i32) (local $y1 i32) (local $y2 i32) (local $y3 i32)
    (local $left v128) (local $right v128) (local $value v128)
    (local $a0 v128) (local $a1 v128) (local $a2 v128) (local $a3 v128)
    (local $b0 v128) (local $b1 v128) (local $b2 v128) (local $b3 v128)
    (loop $panels
      (local.set $row (local.get $rows))
      (local.set $x0 (local.get $x))
      (local.set $y0 (local.get $y))
      (loop $tiles
        (local.set $x1 (i32.add (local.get $x0) (local.get $x_stride)))
        (local.set $x2 (i32.add (local.get $x1) (local.get $x_stride)))
        (local.set $x3 (i32.add (local.get $x2) (local.get $x_stride)))
        (local.set $y1 (i32.add (local.get $y0) (local.get $y_stride)))
        (local.set $y2 (i32.add (local.get $y1) (local.get $y_stride)))
        (local.set $y3 (i32.add (local.get $y2) (local.get $y_stride)))
        (local.set $a0 (v128.load (local.get $y0)))
        (local.set $b0 (v128.load offset=16 (local.get $y0)))
        (local.set $a1 (v128.load (local.get $y1)))
        (local.set $b1 (v128.load offset=16 (local.get $y1)))
        (local.set $a2 (v128.load (local.get $y2)))
        (local.set $b2 (v128.load offset=16 (local.get $y2)))
        (local.set $a3 (v128.load (local.get $y3)))
        (local.set $b3 (v128.load offset=16 (local.get $y3)))
        (local.set $panel (local.get $w))
        (local.set $k (local.get $inner))
        (loop $products
          (local.set $left (v128.load (local.get $panel)))
          (local.set $right (v128.load offset=16 (local.get $panel)))
          (local.set $value (v128.load32_splat (local.get $x0)))
          (local.set $a0 (f32x4.add (local.get $a0) (f32x4.mul (local.get $value) (local.get $left))))
          (local.set $b0 (f32x4.add (local.get $b0) (f32x4.mul (local.get $value) (local.get $right))))
          (local.set $value (v128.load32_splat (local.get $x1)))
          (local.set $a1 (f32x4.add (local.get $a1) (f32x4.mul (local.get $value) (local.get $left))))
          (local.set $b1 (f32x4.add (local.get $b1) (f32x4.mul (local.get $value) (local.get $right))))
          (local.set $value (v128.load32_splat (local.get $x2)))
          (local.set $a2 (f32x4.add (local.get $a2) (f32x4.mul (local.get $value) (local.get $left))))
          (local.set $b2 (f32x4.add (local.get $b2) (f32x4.mul (local.get $value) (local.get $right))))
          (local.set $value (v128.load32_splat (local.get $x3)))
          (local.set $a3 (f32x4.add (local.get $a3) (f32x4.mul (local.get $value) (local.get $left))))
          (local.set $b3 (f32x4.add (local.get $b3) (f32x4.mul (local.get $value) (local.get $right))))
          (local.set $x0 (i32.add (local.get $x0) (i32.const 4)))
          (local.set $x1 (i32.add (local.get $x1) (i32.const 4)))
          (local.set $x2 (i32.add (local.get $x2) (i32.const 4)))
          (local.set $x3 (i32.add (local.get $x3) (i32.const 4)))
          (local.set $panel (i32.add (local.get $panel) (i32.const 32)))
          (br_if $products (local.tee $k (i32.sub (local.get $k) (i32.const 1)))))
        (v128.store (local.get $y0) (local.get $a0))
        (v128.store offset=16 (local.get $y0) (local.get $b0))
        (v128.store (local.get $y1) (local.get $a1))
        (v128.store offset=16 (local.get $y1) (local.get $b1))
        (v128.store (local.get $y2) (local.get $a2))
        (v128.store offset=16 (local.get $y2) (local.get $b2))
        (v128.store (local.get $y3) (local.get $a3))
        (v128.store offset=16 (local.get $y3) (local.get $b3))
        ;; the next tile begins a row below the end of this one
        (local.set $x0 (i32.sub (i32.add (local.get $x3) (local.get $x_stride))
                                (i32.shl (local.get $inner) (i32.const 2))))
        (local.set $y0 (i32.add (local.get $y3) (local.get $y_stride)))
        (br_if $tiles (i32.gt_s
          (local.tee $row (i32.sub (local.get $row) (i32.const 4))) (i32.const 0))))
      (local.set $w (i32.add (local.get $w) (i32.shl (local.get $inner) (i32.const 5))))
      (local.set $y (i32.add (local.get $y) (i32.const 32)))
      (br_if $panels (i32.gt_s
        (local.tee $columns (i32.sub (local.get $columns) (i32.const 8))) (i32.const 0)))))

  ;; exp x = 2ⁿ · exp r with n whole and |r| ≤ ln 2 / 2: the exponent's bits are n + 127,
  ;; and Taylor's series up to r⁶ leaves 1e-7. Beyond what the bits can say it is 0 or ∞.
  (func $exp (param $x v128) (result v128)
    (local $n v128) (local $r v128) (local $sum v128)
    (local.set $x (f32x4.min (f32x4.splat (f32.const 89))
      (f32x4.max (f32x4.splat (f32.const -88.1)) (local.get $x))))
    (local.set $n (f32x4.nearest
      (f32x4.mul (local.get $x) (f32x4.splat (f32.const 1.44269504))))) ;; 1 / ln 2
    ;; r = x − n · ln 2, where ln 2 is a short number and a small rest
    (local.set $r (f32x4.sub (local.get $x)
      (f32x4.mul (local.get $n) (f32x4.splat (f32.const 0.693359375)))))
    (local.set $r (f32x4.add (local.get $r)
      (f32x4.mul (local.get $n) (f32x4.splat (f32.const 2.12194440e-4)))))
    (local.set $sum (f32x4.splat (f32.const 0.00138888889))) ;; 1/720
    (local.set $sum (f32x4.add (f32x4.mul (local.get $sum) (local.get $r))
      (f32x4.splat (f32.const 0.00833333333)))) ;; 1/120
    (local.set $sum (f32x4.add (f32x4.mul (local.get $sum) (local.get $r))
      (f32x4.splat (f32.const 0.0416666667)))) ;; 1/24
    (local.set $sum (f32x4.add (f32x4.mul (local.get $sum) (local.get $r))
      (f32x4.splat (f32.const 0.166666667)))) ;; 1/6
    (local.set $sum (f32x4.add (f32x4.mul (local.get $sum) (local.get $r))
      (f32x4.splat (f32.const 0.5))))
    (local.set $sum (f32x4.add (f32x4.mul (local.get $sum) (local.get $r))
      (f32x4.splat (f32.const 1))))
    (local.set $sum (f32x4.add (f32x4.mul (local.get $sum) (local.get $r))
      (f32x4.splat (f32.const 1))))
    (f32x4.mul (local.get $sum) (i32x4.shl
      (i32x4.add (i32x4.trunc_sat_f32x4_s (local.get $n)) (i32x4.splat (i32.const 127)))
      (i32.const 23))))

  (func (export "exp") (param $x i32) (param $count i32) (param $most f32)
    (loop $numbers
      (v128.store (local.get $x) (call $exp
        (f32x4.sub (v128.load (local.get $x)) (f32x4.splat (local.get $most)))))
      (local.set $x (i32.add (local.get $x) (i32.const 16)))
      (br_if $numbers (i32.gt_s
        (local.tee $count (i32.sub (local.get $count) (i32.const 4))) (i32.const 0)))))

  (func (export "gate") (param $at i32) (param $count i32) (param $a f32) (param $b f32)
    (local $x v128) (local $u v128)
    (loop $numbers
      (local.set $x (v128.load (local.get $at)))
      ;; −u, where u = x · (a + b·x²)
      (local.set $u (f32x4.neg (f32x4.mul (local.get $x)
        (f32x4.add (f32x4.splat (local.get $a))
          (f32x4.mul (f32x4.splat (local.get $b)) (f32x4.mul (local.get $x) (local.get $x)))))))
      ;; from 45 on as ∞: numbers near 1e-38 would slow the products that follow
      (local.set $u (f32x4.add (local.get $u) (v128.and
        (f32x4.gt (local.get $u) (f32x4.splat (f32.const 45))) (f32x4.splat (f32.const 45)))))
      (v128.store (local.get $at) (f32x4.div (local.get $x)
        (f32x4.add (f32x4.splat (f32.const 1)) (call $exp (local.get $u)))))
      (local.set $at (i32.add (local.get $at) (i32.const 16)))
      (br_if $numbers (i32.gt_s
        (local.tee $count (i32.sub (local.get $count) (i32.const 4))) (i32.const 0))))))
