-- Which pairs of images match best? The mean similarity of the matches that were kept.
SELECT image_a, image_b, COUNT(*) AS matches, AVG(similarity) AS similarity
FROM matches
GROUP BY image_a, image_b
ORDER BY similarity DESC, image_a, image_b
LIMIT 10
